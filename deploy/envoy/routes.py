"""The routes of the edge: which call goes to which cluster, generated from the protos.

Every method has its own route. An unknown method has none, so the edge answers it with `ErrorInfo`
and no service is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.rpc import error_details_pb2

from deploy.envoy.replies import OPENAI_PREFIX
from libs.openai.bodies import CHAT_COMPLETIONS_PATH, EMBEDDINGS_PATH, MODELS_PATH
from libs.rpc.access import scope_of
from libs.rpc.identity import SCOPES_KEY, TENANT_KEY, USER_KEY
from libs.rpc.public_api import PUBLIC_FILES, public_services, with_dependencies
from libs.rpc.served_call import MAX_REQUEST_BYTES

# The clusters that get HTTP/1.1, and whose processes they are.
HTTP_CLUSTERS: Mapping[str, str] = MappingProxyType(
    {"inference_http": "inference", "embedding_cache_http": "embedding_cache"}
)
MAX_CALL_SECONDS = 600
MAX_WATCH_SECONDS = 3600

# The cluster of the services in a package.
_CLUSTER_OF_PACKAGE = MappingProxyType(
    {
        "headrace.inference.v1": "inference",
        "headrace.embedding.v1": "embedding_cache",
        "headrace.jobs.v1": "jobs",
        "headrace.cost.v1": "cost",
        "headrace.router.v1": "router",
        "headrace.registry.v1": "registry",
    }
)
# Internal services (see `libs.rpc.public_api`): refused for all callers.
_INTERNAL_PATHS = r"/headrace\.[a-z_]+\.v[0-9]+\.[A-Za-z]+InternalService/.*"
# Forwarded as HTTP/1.1, with the status in trailers: every token is a message.
_OVER_HTTP = frozenset({"headrace.inference.v1.InferenceService.Generate"})
# The services' gRPC servers decompress no messages, see `libs.rpc.server`; the methods of
# `_OVER_HTTP` do, within a limit.
_COMPRESSED = MappingProxyType(
    {
        "match": {
            "prefix": "/",
            "headers": [
                {"name": "grpc-encoding", "present_match": True},
                {
                    "name": "grpc-encoding",
                    "string_match": {"exact": "identity"},
                    "invert_match": True,
                },
            ],
        },
        "direct_response": {"status": 415},
    }
)
_HEALTH = ("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch")
_REFLECTION = (
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)
# The Open Inference Protocol, which Triton's clients use. Its protos are in `tritonclient`.
OPEN_INFERENCE = "inference.GRPCInferenceService"
OPEN_INFERENCE_METHODS = (
    "ModelInfer",
    "ModelStreamInfer",
    "ModelReady",
    "ModelMetadata",
    "ModelConfig",
    "ServerMetadata",
)
OPEN_INFERENCE_HEALTH = (f"/{OPEN_INFERENCE}/ServerLive", f"/{OPEN_INFERENCE}/ServerReady")
_FILTER = "type.googleapis.com/envoy.config.route.v3.FilterConfig"
# These filters are disabled except where a route enables them.
_COUNTED = MappingProxyType({"envoy.filters.http.grpc_stats": {"@type": _FILTER, "config": {}}})
_BUFFER = {
    "@type": "type.googleapis.com/envoy.extensions.filters.http.buffer.v3.BufferPerRoute",
    "buffer": {"max_request_bytes": MAX_REQUEST_BYTES},
}
_BUFFERED = MappingProxyType({"envoy.filters.http.buffer": {"@type": _FILTER, "config": _BUFFER}})
_NOT_TRANSCODED = MappingProxyType(
    {"envoy.filters.http.grpc_json_transcoder": {"@type": _FILTER, "disabled": True}}
)
# The service has seen nothing of these, so that any call may be sent again.
_RETRY_UNSENT = "connect-failure,refused-stream,reset-before-request"
_RETRY_READ = f"{_RETRY_UNSENT},unavailable"
_RETRY_HTTP_READ = f"{_RETRY_UNSENT},retriable-status-codes"
_READS = ("Get", "List", "Query")


def routes() -> list[dict[str, Any]]:
    """Returns Envoy's routes, in the order in which they are tried."""
    found = [
        _openai_route("POST", {"path": CHAT_COMPLETIONS_PATH}, "inference_http"),
    ]
    methods = [(method, name) for service, name in _services() for method in service.methods]
    for method, _ in methods:
        scope_of(method)  # a method without a scope is a mistake: nothing is rendered
        if method.full_name in _OVER_HTTP:
            found.append(_route(method, "inference_http"))
    found.append(dict(_COMPRESSED))
    found += [_route(*each) for each in methods if each[0].full_name not in _OVER_HTTP]
    found.append(_openai_route("POST", {"path": EMBEDDINGS_PATH}, "embedding_cache_http"))
    found.append(_openai_route("GET", {"path_separated_prefix": MODELS_PATH}, "inference_http"))
    found.extend(_open_inference_routes())
    found.extend(_open_route(path, "inference") for path in (*_HEALTH, *OPEN_INFERENCE_HEALTH))
    found.extend(_open_route(path, "reflection") for path in _REFLECTION)
    found.append(
        {
            "match": {"safe_regex": {"regex": _INTERNAL_PATHS}},
            "direct_response": {"status": 403},
        }
    )
    found.append({"match": {"prefix": OPENAI_PREFIX}, "direct_response": {"status": 404}})
    return found


def service_names() -> list[str]:
    """Returns the full names of the services that can be called with JSON."""
    return [service.full_name for service, _ in _services()]


def descriptors() -> bytes:
    """Returns the serialised `FileDescriptorSet` that the transcoder reads.

    It includes the types of error details; without them the transcoder would drop the details.
    """
    files = with_dependencies([*PUBLIC_FILES, error_details_pb2.DESCRIPTOR])
    return descriptor_pb2.FileDescriptorSet(file=files).SerializeToString()


def _services() -> Iterator[tuple[ServiceDescriptor, str]]:
    for service in public_services():
        yield service, _CLUSTER_OF_PACKAGE[service.file.package]


def _route(method: MethodDescriptor, cluster: str) -> dict[str, Any]:
    streams = method.server_streaming or method.client_streaming
    tokens = cluster in {"inference", "inference_http", "embedding_cache"}
    seconds = MAX_WATCH_SECONDS if streams and not tokens else MAX_CALL_SECONDS
    action = _action(cluster, seconds)
    if not method.client_streaming:  # to retry an upload, Envoy would have to buffer it
        read = method.name.startswith(_READS) and not streams
        action["retry_policy"] = _retries(_RETRY_READ if read else _RETRY_UNSENT)
    operation = f"{method.containing_service.full_name}/{method.name}"
    return {
        "match": {"path": f"/{operation}"},
        "route": action,
        "decorator": {"operation": operation},
        "typed_per_filter_config": dict(_COUNTED),
    }


def _openai_route(method: str, match: Mapping[str, str], cluster: str) -> dict[str, Any]:
    """Returns the route of a part of OpenAI's API, which is forwarded as HTTP."""
    action = _action(cluster, MAX_CALL_SECONDS)
    if method == "GET":
        action["retry_policy"] = {**_retries(_RETRY_HTTP_READ), "retriable_status_codes": [503]}
    else:
        action["retry_policy"] = _retries(_RETRY_UNSENT)
    # OPTIONS, so that the CORS filter finds this route and answers a page's preflight.
    methods = {"name": ":method", "string_match": {"safe_regex": {"regex": f"{method}|OPTIONS"}}}
    return {
        "match": {**match, "headers": [methods]},
        "route": action,
        "decorator": {"operation": f"{method} {next(iter(match.values()))}"},
        "typed_per_filter_config": {**_BUFFERED, **_NOT_TRANSCODED},
    }


def _open_inference_routes() -> Iterator[dict[str, Any]]:
    for method in OPEN_INFERENCE_METHODS:
        action = _action("inference", MAX_CALL_SECONDS)
        if method != "ModelStreamInfer":
            action["retry_policy"] = _retries(_RETRY_UNSENT)
        yield {
            "match": {"path": f"/{OPEN_INFERENCE}/{method}"},
            "route": action,
            "decorator": {"operation": f"{OPEN_INFERENCE}/{method}"},
            "typed_per_filter_config": dict(_COUNTED),
        }


def _open_route(path: str, cluster: str) -> dict[str, Any]:
    """Returns the route of a call without a token, which has no identity."""
    return {
        "match": {"path": path},
        "route": _action(cluster, MAX_WATCH_SECONDS),
        "request_headers_to_remove": [TENANT_KEY, USER_KEY, SCOPES_KEY],
    }


def _retries(retry_on: str) -> dict[str, Any]:
    return {
        "retry_on": retry_on,
        "num_retries": 3,
        "retry_back_off": {"base_interval": "0.025s", "max_interval": "0.25s"},
        "host_selection_retry_max_attempts": 3,
        "retry_host_predicate": [
            {
                "name": "envoy.retry_host_predicates.previous_hosts",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.retry.host"
                    ".previous_hosts.v3.PreviousHostsPredicate"
                },
            }
        ],
    }


def _action(cluster: str, max_seconds: int) -> dict[str, Any]:
    limit = f"{max_seconds}s"
    return {
        "cluster": cluster,
        "timeout": "0s",  # streams are long; the next line limits them
        "max_stream_duration": {"max_stream_duration": limit, "grpc_timeout_header_max": limit},
    }
