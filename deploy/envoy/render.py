"""Renders the edge's configuration and says how to run it."""

from __future__ import annotations

import json
import secrets
import string
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deploy import keys
from deploy.envoy import replies, routes
from libs.openai.bodies import CHAT_COMPLETIONS_PATH

DEPLOY = Path(__file__).resolve().parents[2] / "deploy" / "envoy"
GRPC_CLUSTERS = ("inference", "embedding_cache", "registry", "router", "cost", "jobs")
CLUSTERS = (*GRPC_CLUSTERS, *routes.HTTP_CLUSTERS)
LOCAL_ORIGINS = r"https?://(localhost|127\.0\.0\.1)(:[0-9]+)?"

_REFLECTING = ("registry", "router", "cost", "jobs")
_OTLP_PORT = 4317


@dataclass(frozen=True, kw_only=True)
class Edge:
    """What differs from one mesh's edge to another's.

    Attributes:
        home: the mesh's `HEADRACE_HOME`.
        listen_address: where callers come in, as `host:port`.
        admin_address: Envoy's own interface, with Prometheus metrics at `/stats/prometheus`.
        services: the `host:port` of each replica, by cluster; see `CLUSTERS`.
        otlp_endpoint: where traces go, such as `http://127.0.0.1:4317`. None: nowhere.
        trace_sample_percent: how many of the traces that begin here are exported.
        cors_origin_regex: the origins whose pages may call.
        worker_threads: how many threads carry bytes.
    """

    home: Path
    listen_address: str
    admin_address: str
    services: Mapping[str, Sequence[str]]
    otlp_endpoint: str | None = None
    trace_sample_percent: float = 100.0
    cors_origin_regex: str = LOCAL_ORIGINS
    worker_threads: int = 2


def config_path(home: Path) -> Path:
    """Returns where the rendered configuration is."""
    return home / "run" / "envoy.yaml"


def render(edge: Edge) -> Path:
    """Writes the edge's configuration and what it refers to; makes the keys if need be.

    Raises:
        ValueError: an address or a setting cannot be used, or a service has no address.
        KeyFileError: see `keys.ensure_keys`.
    """
    missing = [name for name in CLUSTERS if not edge.services.get(name)]
    if missing:
        raise ValueError(f"the edge needs an address of {', '.join(missing)}")
    keys.ensure_keys(edge.home)
    path = config_path(edge.home)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptors_file = path.with_name("headrace.pb")
    _write(descriptors_file, routes.descriptors())
    values: dict[str, Any] = {
        "listen_address": _address(edge.listen_address),
        "admin_address": _address(edge.admin_address),
        "tracing": _tracing(edge),
        "chat_completions_path": CHAT_COMPLETIONS_PATH,
        "local_replies": replies.local_replies(),
        "jwt_issuer": keys.ISSUER,
        "jwt_audience": keys.AUDIENCE,
        "jwks_file": str(keys.jwks_path(edge.home).absolute()),
        "keys_dir": str(keys.keys_dir(edge.home).absolute()),
        "descriptors_file": str(descriptors_file.absolute()),
        "transcoded_services": routes.service_names(),
        "max_json_body_bytes": replies.MAX_JSON_BODY_BYTES,
        "cors_origin_regex": edge.cors_origin_regex,
        "routes": routes.routes(),
        "otlp": _endpoints(
            "otlp", [_otlp_address(edge.otlp_endpoint)] if edge.otlp_endpoint else []
        ),
        "reflection": _endpoints(
            "reflection", [address for name in _REFLECTING for address in edge.services[name]]
        ),
        **{name: _endpoints(name, edge.services[name]) for name in CLUSTERS},
    }
    template = string.Template((DEPLOY / "envoy.yaml").read_text())
    _write(path, template.substitute({k: _yaml(v) for k, v in values.items()}).encode())
    return path


def argv(edge: Edge, *, log_level: str = "warning") -> list[str]:
    """Returns the command that runs the edge in the foreground, once it is rendered."""
    return [
        str(Path(sys.executable).with_name("envoy")),
        "--config-path",
        str(config_path(edge.home).absolute()),
        "--log-level",
        log_level,
        "--concurrency",
        str(edge.worker_threads),
        # Shares no memory by number, so that meshes stand side by side.
        "--disable-hot-restart",
        "--file-flush-interval-msec",
        "1000",
    ]


def _yaml(value: Any) -> str:
    """Returns a value in JSON, which is YAML; the elements of a list each on a line of its own."""
    if isinstance(value, list) and value:
        indent = "\n" + 16 * " "
        return "[" + ",".join(indent + json.dumps(element) for element in value) + "]"
    return json.dumps(value)


def _write(path: Path, content: bytes) -> None:
    """Replaces a file at one go: an edge that is starting reads the old one or the new."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    draft.write_bytes(content)
    draft.replace(path)


def _address(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"{address!r} is no address: host:port is needed")
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}


def _endpoints(cluster: str, addresses: Sequence[str]) -> dict[str, Any]:
    endpoints = [{"endpoint": {"address": _address(address)}} for address in addresses]
    return {"cluster_name": cluster, "endpoints": [{"lb_endpoints": endpoints}]}


def _otlp_address(endpoint: str) -> str:
    url = urlsplit(endpoint)
    if url.scheme != "http" or not url.hostname:
        raise ValueError(f"OTEL_EXPORTER_OTLP_ENDPOINT is {endpoint!r}: http://host:port is needed")
    return f"{url.hostname}:{url.port or _OTLP_PORT}"


def _tracing(edge: Edge) -> dict[str, Any] | None:
    if edge.otlp_endpoint is None:
        return None
    return {
        "random_sampling": {"value": edge.trace_sample_percent},
        "provider": {
            "name": "envoy.tracers.opentelemetry",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig",
                "grpc_service": {"envoy_grpc": {"cluster_name": "otlp"}, "timeout": "1s"},
                "service_name": "headrace-edge",
            },
        },
    }
