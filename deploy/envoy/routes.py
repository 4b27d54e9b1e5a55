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

from deploy.envoy.actions import (
    COUNTED,
    NOT_TRANSCODED,
    RATE_LIMIT_FILTER,
    RETRY_HTTP_READ,
    RETRY_READ,
    RETRY_UNSENT,
    SMALL,
    forwarded,
    once_complete,
    retries,
)
from deploy.envoy.limits import (
    MAX_CHECK_SECONDS,
    MAX_OPEN_BODY_BYTES,
    MAX_OPEN_STREAM_SECONDS,
    Limits,
)
from deploy.envoy.overload import address_rate
from deploy.envoy.replies import OPENAI_PREFIX
from libs.openai.bodies import CHAT_COMPLETIONS_PATH, EMBEDDINGS_PATH, MODELS_PATH
from libs.rpc.access import scope_of
from libs.rpc.channel import MAX_MESSAGE_BYTES
from libs.rpc.framing import PREFIX
from libs.rpc.http_api import HEALTH_PATH
from libs.rpc.identity import SCOPES_KEY, TENANT_KEY, USER_KEY
from libs.rpc.public_api import PUBLIC_FILES, public_services, with_dependencies
from libs.rpc.served_call import MAX_REQUEST_BYTES

# The clusters that get HTTP/1.1, and whose processes they are.
HTTP_CLUSTERS: Mapping[str, str] = MappingProxyType(
    {"inference_http": "inference", "embedding_cache_http": "embedding_cache"}
)
# `ModelStreamInfer`: a server of its own, which receives smaller messages.
STREAM_CLUSTERS: Mapping[str, str] = MappingProxyType({"inference_streams": "inference"})
# The clusters with limits of their own for some calls, and whose processes they are: a caller who
# opens many of these uses no capacity of other calls.
LIMITED_CLUSTERS: Mapping[str, str] = MappingProxyType(
    {
        "jobs_watch": "jobs",
        "health": "inference",
        "health_watch": "inference",
    }
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
# Watches, which stay open: in a cluster of their own.
_WATCHES: Mapping[str, str] = MappingProxyType(
    {"headrace.jobs.v1.JobService.WatchJob": "jobs_watch"}
)
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
_CHECK = "/grpc.health.v1.Health/Check"
_WATCH = "/grpc.health.v1.Health/Watch"
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
OPEN_INFERENCE_STREAM = "ModelStreamInfer"
OPEN_INFERENCE_HEALTH = (f"/{OPEN_INFERENCE}/ServerLive", f"/{OPEN_INFERENCE}/ServerReady")
_READS = ("Get", "List", "Query")
# The longest body of a call with one message.
_MAX_MESSAGE_BODY_BYTES = PREFIX.size + MAX_REQUEST_BYTES
_MAX_TENSOR_BODY_BYTES = PREFIX.size + MAX_MESSAGE_BYTES


def routes(limits: Limits) -> list[dict[str, Any]]:
    """Returns Envoy's routes, in the order in which they are tried."""
    found = _openai_routes("POST", {"path": CHAT_COMPLETIONS_PATH}, "inference_http", limits)
    methods = [(method, name) for service, name in _services() for method in service.methods]
    for method, _ in methods:
        scope_of(method)  # a method without a scope is a mistake: nothing is rendered
        if method.full_name in _OVER_HTTP:
            found.extend(_routes(method, "inference_http", limits))
    found.append(dict(_COMPRESSED))
    for method, cluster in methods:
        if method.full_name not in _OVER_HTTP:
            found.extend(_routes(method, cluster, limits))
    found.extend(_openai_routes("POST", {"path": EMBEDDINGS_PATH}, "embedding_cache_http", limits))
    found.extend(
        _openai_routes("GET", {"path_separated_prefix": MODELS_PATH}, "inference_http", limits)
    )
    found.extend(_open_inference_routes(limits))
    found.extend(_open_routes(limits))
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


def _routes(method: MethodDescriptor, cluster: str, limits: Limits) -> list[dict[str, Any]]:
    streams = method.server_streaming or method.client_streaming
    tokens = cluster in {"inference", "inference_http", "embedding_cache"}
    action = forwarded(
        _WATCHES.get(method.full_name, cluster),
        limits,
        max_seconds=MAX_WATCH_SECONDS if streams and not tokens else MAX_CALL_SECONDS,
        streams_requests=method.client_streaming,
    )
    operation = f"{method.containing_service.full_name}/{method.name}"
    route = {
        "match": {"path": f"/{operation}"},
        "route": action,
        "decorator": {"operation": operation},
        "typed_per_filter_config": dict(COUNTED),
    }
    if method.client_streaming:  # to retry an upload, Envoy would have to buffer it
        return [route]
    read = method.name.startswith(_READS) and not streams
    action["retry_policy"] = retries(RETRY_READ if read else RETRY_UNSENT)
    return once_complete(route, limits, max_body_bytes=_MAX_MESSAGE_BODY_BYTES)


def _openai_routes(
    method: str, match: Mapping[str, str], cluster: str, limits: Limits
) -> list[dict[str, Any]]:
    """Returns the routes of a part of OpenAI's API, which is forwarded as HTTP."""
    action = forwarded(cluster, limits, max_seconds=MAX_CALL_SECONDS)
    if method == "GET":
        action["retry_policy"] = {**retries(RETRY_HTTP_READ), "retriable_status_codes": [503]}
    else:
        action["retry_policy"] = retries(RETRY_UNSENT)
    # OPTIONS, so that the CORS filter finds this route and answers a page's preflight.
    methods = {"name": ":method", "string_match": {"safe_regex": {"regex": f"{method}|OPTIONS"}}}
    route = {
        "match": {**match, "headers": [methods]},
        "route": action,
        "decorator": {"operation": f"{method} {next(iter(match.values()))}"},
        "typed_per_filter_config": dict(NOT_TRANSCODED),
    }
    return once_complete(route, limits, max_body_bytes=MAX_REQUEST_BYTES)


def _open_inference_routes(limits: Limits) -> Iterator[dict[str, Any]]:
    for method in OPEN_INFERENCE_METHODS:
        streams = method == OPEN_INFERENCE_STREAM
        action = forwarded(
            "inference_streams" if streams else "inference",
            limits,
            max_seconds=MAX_CALL_SECONDS,
            streams_requests=streams,
        )
        route = {
            "match": {"path": f"/{OPEN_INFERENCE}/{method}"},
            "route": action,
            "decorator": {"operation": f"{OPEN_INFERENCE}/{method}"},
            "typed_per_filter_config": dict(COUNTED),
        }
        if streams:
            yield route
        else:
            action["retry_policy"] = retries(RETRY_UNSENT)
            yield from once_complete(route, limits, max_body_bytes=_MAX_TENSOR_BODY_BYTES)


def _open_routes(limits: Limits) -> Iterator[dict[str, Any]]:
    """Yields the routes of calls without a token: they have no identity, and limits of their own.

    They use separate connections, so that any number of them leaves room for calls with a
    token. Only `GET /healthz` takes the route of chat completions: it shows if these are served.
    """
    for path in (_CHECK, *OPEN_INFERENCE_HEALTH):
        yield from _open_call(path, "health", MAX_CHECK_SECONDS, limits)
    yield from _open_call(_WATCH, "health_watch", MAX_OPEN_STREAM_SECONDS, limits)
    yield from _open_call(HEALTH_PATH, "inference_http", MAX_CHECK_SECONDS, limits)
    for path in _REFLECTION:
        action = forwarded(
            "reflection", limits, max_seconds=MAX_OPEN_STREAM_SECONDS, streams_requests=True
        )
        action["idle_timeout"] = f"{limits.body_idle_seconds}s"
        yield _open_route(path, action, limits)


def _open_call(path: str, cluster: str, max_seconds: int, limits: Limits) -> list[dict[str, Any]]:
    action = forwarded(cluster, limits, max_seconds=max_seconds)
    action["retry_policy"] = retries(RETRY_UNSENT)  # no health checks find a dead host there
    route = _open_route(path, action, limits)
    return once_complete(route, limits, max_body_bytes=MAX_OPEN_BODY_BYTES)


def _open_route(path: str, action: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    return {
        "match": {"path": path},
        "route": dict(action),
        # Answers of these are short. Without the last header they are not compressed.
        # Services must not receive a token that was not verified.
        "request_headers_to_remove": [
            TENANT_KEY,
            USER_KEY,
            SCOPES_KEY,
            "grpc-accept-encoding",
            "authorization",
        ],
        "typed_per_filter_config": {
            **NOT_TRANSCODED,
            **SMALL,
            RATE_LIMIT_FILTER: address_rate(limits),
        },
    }
