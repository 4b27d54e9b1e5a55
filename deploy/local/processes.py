"""The processes of a mesh: what each executes, in which environment, and how it shows readiness."""

from __future__ import annotations

import importlib.metadata
import os
import string
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy import keys
from deploy.envoy import render, routes
from deploy.errors import CliError
from deploy.host import REPOSITORY
from deploy.local.layout import Layout
from deploy.local.ports import address, replicas

_BIN = Path(sys.executable).parent
DRAIN_SECONDS = 5
# With its event engine off gRPC wakes fewer threads for each message, which is what tokens cost.
# The switch is undocumented: it is used with the version only that it was tried with.
_HOT_PATH = frozenset({"inference"})
_GRPC_TRIED = "1.85.1"
_GRPC_EXPERIMENTS = "-event_engine_client,-event_engine_listener"
# What the user sets goes to all services, but what differs between them: that is ours to set.
_USER_SETTING_PREFIXES = ("HEADRACE_", "OTEL_")
_NOT_FOR_ALL = frozenset({"HEADRACE_DATABASE_URL"})  # each service has a database of its own
_SYSTEM_SETTINGS = ("HOME", "LANG", "TZ", "TMPDIR", "SSL_CERT_FILE")
_PEERS: Mapping[str, Sequence[str]] = {
    "registry": (),
    "router": ("registry",),
    "inference": ("router", "cost", "nats"),
    "embedding_cache": ("router", "cost", "inference", "nats"),
    "cost": ("nats",),
    "jobs": ("nats",),
    "worker": ("inference", "embedding_cache", "jobs", "nats"),
    "pool_agent": ("registry",),
}


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """One process.

    Attributes:
        group: `edge`, `services` or `backends`; they end in this order, each when those before it
            have ended, so that work that drains still finds what it needs.
        health: a `host:port` with gRPC health, or the URL that answers 200 when it is ready.
        port: where it listens for its work.
    """

    name: str
    group: str
    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    health: str
    port: int


def mesh_processes(layout: Layout, ports: Mapping[str, int]) -> list[ProcessSpec]:
    """Returns the processes of the mesh, those that others wait for first."""
    return [
        _nats(layout, ports),
        *(_triton(name, layout, ports) for name in replicas(ports, "triton")),
        *(
            _service(replica, service, layout, ports)
            for service in _PEERS
            for replica in replicas(ports, service)
        ),
        _edge(layout, ports),
    ]


def write_configurations(layout: Layout, ports: Mapping[str, int]) -> None:
    """Writes the files that the processes read: keys, the edge's and the bus's configuration.

    Raises:
        ValueError: a setting of the user cannot be used.
        KeyFileError: see `keys.ensure_keys`.
    """
    keys.ensure_keys(layout.home)
    render.render(_edge_settings(layout, ports))
    template = string.Template((REPOSITORY / "deploy/nats/nats.conf").read_text())
    _nats_config(layout).write_text(
        template.substitute(
            listen_address=address(ports, "nats.client"),
            monitor_address=address(ports, "nats.monitor"),
            server_name="nats",
            store_dir=layout.home / "nats",
        )
    )


def system_environment() -> dict[str, str]:
    """Returns what every process gets of the caller's environment."""
    kept = {key: os.environ[key] for key in _SYSTEM_SETTINGS if key in os.environ}
    return {"PATH": f"{_BIN}:/usr/local/bin:/usr/bin:/bin", **kept}


def _nats(layout: Layout, ports: Mapping[str, int]) -> ProcessSpec:
    return ProcessSpec(
        name="nats",
        group="backends",
        argv=[str(_BIN / "nats-server"), "-c", str(_nats_config(layout))],
        health=f"http://{address(ports, 'nats.monitor')}/healthz",
        port=ports["nats.client"],
    )


def _nats_config(layout: Layout) -> Path:
    return layout.run / "nats.conf"


def _triton(backend: str, layout: Layout, ports: Mapping[str, int]) -> ProcessSpec:
    arguments = {
        "--home": str(layout.home),
        "--backend-id": backend,
        **{
            f"--{name}-port": str(ports[f"{backend}.{name}"])
            for name in ("grpc", "http", "metrics")
        },
    }
    return ProcessSpec(
        name=backend,
        group="backends",
        argv=[
            sys.executable, "-m", "deploy.triton.run",
            *(word for pair in arguments.items() for word in pair),
        ],
        health=f"http://{address(ports, f'{backend}.http')}/v2/health/ready",
        port=ports[f"{backend}.grpc"],
    )  # fmt: skip


def _edge(layout: Layout, ports: Mapping[str, int]) -> ProcessSpec:
    return ProcessSpec(
        name="envoy",
        group="edge",
        argv=render.argv(_edge_settings(layout, ports)),
        health=f"http://{address(ports, 'envoy.admin')}/ready",
        port=ports["envoy.edge"],
    )


def _edge_settings(layout: Layout, ports: Mapping[str, int]) -> render.Edge:
    return render.Edge(
        home=layout.home,
        listen_address=address(ports, "envoy.edge"),
        admin_address=address(ports, "envoy.admin"),
        services={
            **{name: _addresses(ports, name) for name in render.GRPC_CLUSTERS},
            **{
                cluster: _addresses(ports, service, "http")
                for cluster, service in routes.HTTP_CLUSTERS.items()
            },
        },
        otlp_endpoint=os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None,
        trace_sample_percent=_trace_sample_percent(),
    )


def _trace_sample_percent() -> float:
    text = os.environ.get("HEADRACE_TRACE_SAMPLE_PERCENT") or "100"
    try:
        return float(text)
    except ValueError as error:
        raise CliError(
            f"HEADRACE_TRACE_SAMPLE_PERCENT must be a number, and it is {text!r}"
        ) from error


def _addresses(ports: Mapping[str, int], service: str, port: str = "grpc") -> list[str]:
    return [address(ports, f"{replica}.{port}") for replica in replicas(ports, service)]


def _target(ports: Mapping[str, int], service: str) -> str:
    """Returns what a gRPC channel takes: an address, or several to balance over."""
    found = _addresses(ports, service)
    return found[0] if len(found) == 1 else f"ipv4:{','.join(found)}"


def _service(name: str, service: str, layout: Layout, ports: Mapping[str, int]) -> ProcessSpec:
    environment = {
        "HEADRACE_HOME": str(layout.home),
        "HEADRACE_LISTEN_ADDRESS": address(ports, f"{name}.grpc"),
        "HEADRACE_METRICS_ADDRESS": address(ports, f"{name}.metrics"),
        "HEADRACE_INPUT_HASH_KEY_FILE": str(keys.input_hash_key_path(layout.home)),
        "HEADRACE_DRAIN_SECONDS": str(DRAIN_SECONDS),
        # Threads share these many heaps: by default each may keep one of its own half empty.
        "MALLOC_ARENA_MAX": "2",
    }
    for peer in _PEERS[service]:
        if peer == "nats":
            environment["HEADRACE_NATS_URL"] = f"nats://{address(ports, 'nats.client')}"
            environment["HEADRACE_NATS_MONITORING_URL"] = f"http://{address(ports, 'nats.monitor')}"
        else:
            environment[f"HEADRACE_{peer.upper()}_ADDRESS"] = _target(ports, peer)
    if service in routes.HTTP_CLUSTERS.values():
        environment["HEADRACE_HTTP_LISTEN_ADDRESS"] = address(ports, f"{name}.http")
    if service in _HOT_PATH and importlib.metadata.version("grpcio") == _GRPC_TRIED:
        environment["GRPC_EXPERIMENTS"] = _GRPC_EXPERIMENTS
    if service == "pool_agent":
        backend = f"triton-{replicas(ports, service).index(name)}"
        environment |= {
            "HEADRACE_BACKEND_ID": backend,
            "HEADRACE_TRITON_ADDRESS": address(ports, f"{backend}.grpc"),
            "HEADRACE_MODEL_REPOSITORY": str(layout.home / "triton" / backend / "models"),
        }
    return ProcessSpec(
        name=name,
        group="services",
        argv=[sys.executable, "-m", f"services.{service}"],
        environment=_user_environment() | environment,
        health=address(ports, f"{name}.grpc"),
        port=ports[f"{name}.grpc"],
    )


def _user_environment() -> dict[str, str]:
    return {
        key: value
        for key, value in os.environ.items()
        if key.startswith(_USER_SETTING_PREFIXES) and key not in _NOT_FOR_ALL
    }
