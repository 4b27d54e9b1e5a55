"""Renders the edge's configuration and returns the command that runs it."""

from __future__ import annotations

import json
import secrets
import socket
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deploy.envoy import overload, replies, routes, tokens
from deploy.envoy.actions import complete_marker
from deploy.envoy.cors import Cors
from deploy.envoy.limits import MAX_OPEN_BODY_BYTES, SPARE_CONNECTIONS, Limits
from deploy.envoy.tls import (
    HANDSHAKE_SECONDS,
    SDS_FILE,
    Tls,
    certificate_source,
    listener_socket,
    response_headers,
)
from libs.addresses import host_and_port, unix_path
from libs.openai.bodies import CHAT_COMPLETIONS_PATH
from libs.tls import MESH_NAME, TlsFiles

GRPC_CLUSTERS = ("inference", "embedding_cache", "registry", "router", "cost", "jobs")
CLUSTERS = (*GRPC_CLUSTERS, *routes.HTTP_CLUSTERS, *routes.STREAM_CLUSTERS)
CONFIG_FILE = "envoy.yaml"
DESCRIPTORS_FILE = "headrace.pb"
TOKENS_FILE = "tokens.json"

_TEMPLATES = Path(__file__).resolve().parent
_REFLECTING = ("registry", "router", "cost", "jobs")
_OTLP_PORT = 4317
_EVERY_IPV6 = "::"  # a socket with this address also takes IPv4
_UPSTREAM_TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
RECEIVE_BUFFER_BYTES = 262_144
_PATH = "%PATH(NQ:ORIG_OR_PATH)%"


@dataclass(frozen=True, kw_only=True)
class Edge:
    """The settings that differ between the edges of two meshes.

    Attributes:
        folder: the absolute folder that Envoy reads the rendered files from.
        listen_address: the `host:port` for callers; an IPv6 address has brackets.
        admin_address: where Envoy's admin interface listens: `unix:/path`. Any program that
            reaches it can stop the edge and make it log tokens, so a `host:port` is for tests only.
        metrics_address: the `host:port` at which `GET /stats/prometheus` of the admin interface,
            and nothing else of it, can be read.
        services: the address of each replica, by cluster (see `CLUSTERS`): `host:port`, or
            `unix:/path`.
        tls: the certificates that the edge shows to services at a `host:port`; None: no TLS.
        jwt_issuer: the issuer of valid tokens.
        jwt_audience: the audience of valid tokens.
        jwks_file: the path of the public keys that tokens are verified with. `write_tokens` makes
            an edge that runs use a changed file.
        otlp_endpoint: where traces are sent, such as `http://127.0.0.1:4317`; None: nowhere.
        trace_sample_percent: share of the traces started by the edge that is exported.
        cors: the web pages that may call.
        listener_tls: the certificate that callers see; None: they connect without TLS.
        trusted_proxies: how many proxies before the edge add the address of the caller to
            `x-forwarded-for`. 0: the caller is who connects.
        worker_threads: the number of Envoy's worker threads.
        limits: what callers may use.
    """

    folder: Path
    listen_address: str
    admin_address: str
    metrics_address: str
    services: Mapping[str, Sequence[str]]
    jwt_issuer: str
    jwt_audience: str
    jwks_file: Path
    tls: TlsFiles | None = None
    otlp_endpoint: str | None = None
    trace_sample_percent: float = 100.0
    cors: Cors = field(default_factory=Cors)
    listener_tls: Tls | None = None
    trusted_proxies: int = 0
    worker_threads: int = 2
    limits: Limits = field(default_factory=Limits)

    @property
    def config_file(self) -> Path:
        """The path of the rendered configuration."""
        return self.folder / CONFIG_FILE


def files(edge: Edge) -> Mapping[str, bytes]:
    """Returns the files that Envoy reads from `edge.folder`, by name.

    Raises:
        ValueError: a setting is invalid, or a service has no address.
        OSError: the public keys cannot be read.
    """
    missing = [name for name in CLUSTERS if not edge.services.get(name)]
    if missing:
        raise ValueError(f"the edge needs an address of {', '.join(missing)}")
    template = string.Template((_TEMPLATES / CONFIG_FILE).read_text())
    values = {name: _yaml(value) for name, value in _values(edge).items()}
    sources = {SDS_FILE: certificate_source(edge.listener_tls)} if edge.listener_tls else {}
    return {
        DESCRIPTORS_FILE: routes.descriptors(),
        **sources,
        TOKENS_FILE: _tokens(edge),
        CONFIG_FILE: template.substitute(values).encode(),
    }


def write(edge: Edge) -> Path:
    """Writes the files into `edge.folder` and returns the path of the configuration.

    Raises:
        ValueError: see `files`.
    """
    rendered = files(edge)
    edge.folder.mkdir(parents=True, exist_ok=True)
    for name, content in rendered.items():
        _replace(edge.folder / name, content)
    return edge.config_file


def write_tokens(edge: Edge) -> None:
    """Lets an edge that runs verify tokens with the public keys that its file holds now.

    It keeps its calls and its connections, and uses the keys within milliseconds.

    Raises:
        OSError: the keys cannot be read.
    """
    _replace(edge.folder / TOKENS_FILE, _tokens(edge))


def argv(edge: Edge, *, program: str = "envoy", log_level: str = "warning") -> list[str]:
    """Returns the command that runs the edge in the foreground once its files are written."""
    return [
        program,
        "--config-path",
        str(edge.config_file),
        "--log-level",
        log_level,
        "--concurrency",
        str(edge.worker_threads),
        # Hot restart would share memory between the edges of several meshes on one machine.
        "--disable-hot-restart",
        "--file-flush-interval-msec",
        "1000",
    ]


def _values(edge: Edge) -> dict[str, Any]:
    """Returns the values of the template's placeholders."""
    return {
        "listen_address": _address(edge.listen_address),
        "admin_address": _address(edge.admin_address, mode=0o600),
        "metrics_address": _address(edge.metrics_address),
        "admin": _load_assignment("admin", [edge.admin_address]),
        "tracing": _tracing(edge),
        "chat_completions_path": CHAT_COMPLETIONS_PATH,
        "local_replies": replies.local_replies(),
        "token_filter": tokens.filter_in(edge.folder / TOKENS_FILE),
        "claim_rules": tokens.claim_rules(),
        "descriptors_file": str(edge.folder / DESCRIPTORS_FILE),
        "transcoded_services": routes.service_names(),
        "max_json_body_bytes": replies.MAX_JSON_BODY_BYTES,
        "cors_policy": edge.cors.policy(),
        "response_headers": response_headers(edge.listener_tls),
        "listener_tls": listener_socket(edge.folder) if edge.listener_tls else None,
        "handshake_timeout": f"{HANDSHAKE_SECONDS}s",
        "trusted_proxies": edge.trusted_proxies,
        "routes": routes.routes(edge.limits),
        "max_open_body_bytes": MAX_OPEN_BODY_BYTES,
        "max_requests": edge.limits.max_requests,
        "max_http_connections": edge.limits.max_requests + SPARE_CONNECTIONS,
        "body_timeout": f"{edge.limits.body_seconds}s",
        "complete_marker": complete_marker(),
        "rate_limits": overload.tenant_rate(edge.limits),
        "overload_manager": overload.overload_manager(edge.limits),
        "otlp": _load_assignment(
            "otlp", [_otlp_address(edge.otlp_endpoint)] if edge.otlp_endpoint else []
        ),
        "reflection": _load_assignment(
            "reflection", [address for name in _REFLECTING for address in edge.services[name]]
        ),
        **_clusters(edge),
        "reflection_type": _discovery(edge.services[_REFLECTING[0]]),
        "admin_type": _discovery([edge.admin_address]),
        "grpc_tls": _transport_socket(edge, "h2"),
        "http_tls": _transport_socket(edge, "http/1.1"),
        "http_receive_buffer": _receive_buffer(edge.services["inference_http"]),
    }


def _tokens(edge: Edge) -> bytes:
    resource = tokens.filter_file(
        issuer=edge.jwt_issuer, audience=edge.jwt_audience, jwks=edge.jwks_file.read_text()
    )
    return json.dumps(resource, indent=2).encode()


def _yaml(value: Any) -> str:
    """Returns a value as JSON, which is valid YAML, with each element of a list on its own line."""
    if isinstance(value, list) and value:
        indent = "\n" + 16 * " "
        return "[" + ",".join(indent + json.dumps(element) for element in value) + "]"
    return json.dumps(value)


def _replace(path: Path, content: bytes) -> None:
    """Replaces a file atomically: an edge that is starting reads the old one or the new one."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    draft.write_bytes(content)
    draft.replace(path)


def _address(address: str, *, mode: int | None = None) -> dict[str, Any]:
    """Returns an address as Envoy has it; `mode` is that of the socket file where Envoy listens."""
    path = unix_path(address)
    if path is not None:
        return {"pipe": {"path": path, **({} if mode is None else {"mode": mode})}}
    host, port = host_and_port(address)
    # A socket with this address takes IPv4, too.
    both = {"ipv4_compat": True} if host == _EVERY_IPV6 else {}
    return {"socket_address": {"address": host, "port_value": port, **both}}


def _discovery(addresses: Sequence[str]) -> str:
    """Returns how Envoy finds the hosts of a cluster: there is no name to look up for a socket."""
    is_unix = any(unix_path(address) is not None for address in addresses)
    return "STATIC" if is_unix else "STRICT_DNS"


def _clusters(edge: Edge) -> dict[str, Any]:
    """Returns the hosts of each cluster, and how Envoy finds them."""
    services = {name: name for name in CLUSTERS} | dict(routes.LIMITED_CLUSTERS)
    found: dict[str, Any] = {}
    for name, service in services.items():
        found[name] = _load_assignment(name, edge.services[service])
        found[f"{name}_type"] = _discovery(edge.services[service])
    return found


def _receive_buffer(addresses: Sequence[str]) -> dict[str, Any] | None:
    """Limits what the kernel stores for a slow reader.

    HTTP/1.1 has no flow control windows: TCP's receive buffer would grow to tens of megabytes. The
    buffer of a Unix socket does not grow.
    """
    if _discovery(addresses) == "STATIC":
        return None
    option = {
        "level": socket.SOL_SOCKET,
        "name": socket.SO_RCVBUF,
        "int_value": RECEIVE_BUFFER_BYTES,
        "state": "STATE_PREBIND",
    }
    return {"socket_options": [option]}


def _transport_socket(edge: Edge, protocol: str) -> dict[str, Any] | None:
    """Returns how Envoy connects to services: with certificates of the mesh on both sides."""
    if edge.tls is None or _discovery(edge.services["inference"]) == "STATIC":
        return None
    certificate = {
        "certificate_chain": {"filename": str(edge.tls.certificate)},
        "private_key": {"filename": str(edge.tls.key)},
    }
    expected = {
        "trusted_ca": {"filename": str(edge.tls.ca)},
        "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": MESH_NAME}}],
    }
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": _UPSTREAM_TLS,
            "sni": MESH_NAME,
            "common_tls_context": {
                "tls_params": {
                    "tls_minimum_protocol_version": "TLSv1_3",
                    "tls_maximum_protocol_version": "TLSv1_3",
                },
                "alpn_protocols": [protocol],
                "tls_certificates": [certificate],
                "validation_context": expected,
            },
        },
    }


def _load_assignment(cluster: str, addresses: Sequence[str]) -> dict[str, Any]:
    endpoints = [{"endpoint": {"address": _address(address)}} for address in addresses]
    return {"cluster_name": cluster, "endpoints": [{"lb_endpoints": endpoints}]}


def _otlp_address(endpoint: str) -> str:
    url = urlsplit(endpoint)
    if url.scheme != "http" or not url.hostname:
        raise ValueError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT is {endpoint!r}, but it must be http://host:port"
        )
    return f"{url.hostname}:{url.port or _OTLP_PORT}"


def _tracing(edge: Edge) -> dict[str, Any] | None:
    if edge.otlp_endpoint is None:
        return None
    return {
        "random_sampling": {"value": edge.trace_sample_percent},
        # In place of Envoy's own, which have the query: callers put secrets into it.
        "custom_tags": [
            {"tag": "http.url", "value": f"%REQ(:SCHEME)%://%REQ(:AUTHORITY)%{_PATH}"},
            {"tag": "grpc.path", "value": _PATH},
        ],
        "provider": {
            "name": "envoy.tracers.opentelemetry",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig",
                "grpc_service": {"envoy_grpc": {"cluster_name": "otlp"}, "timeout": "1s"},
                "service_name": "headrace-edge",
            },
        },
    }
