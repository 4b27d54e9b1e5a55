"""The processes of a mesh: command, addresses, folders and how each reports that it is ready."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from deploy import binaries, keys
from deploy.certificates import tls_files, tls_folder
from deploy.envoy import render, routes
from deploy.host import PROGRAMS
from deploy.local.configuration import addresses, edge_settings, nats_config
from deploy.local.layout import Layout
from deploy.local.ports import address, inner_address, replicas, triton_address
from deploy.nats.users import SYSTEM_USER
from libs.addresses import one_target
from libs.tls import TlsFiles

DRAIN_SECONDS = 5
# Settings of the user are passed to all services, except those that must differ between services.
_USER_SETTING_PREFIXES = ("HEADRACE_", "OTEL_")
_NOT_FOR_ALL = frozenset({"HEADRACE_DATABASE_URL"})  # each service has its own database
_SYSTEM_SETTINGS = ("HOME", "LANG", "TZ", "TMPDIR", "SSL_CERT_FILE")
# For the service that calls providers. Not in lower case: gRPC would use them inside the mesh.
_PROXY_SETTINGS = ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")
# The services that each service calls. The order is the order of the start.
_PEERS: Mapping[str, Sequence[str]] = {
    "registry": (),
    "router": ("registry",),
    "inference": ("router", "cost", "nats"),
    "embedding_cache": ("router", "cost", "inference", "nats"),
    "cost": ("nats",),
    "jobs": ("nats",),
    "worker": ("inference", "embedding_cache", "jobs", "cost", "nats"),
    "pool_agent": ("registry",),
}


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """How to run one process.

    Attributes:
        group: `edge`, `services` or `backends`. The groups are stopped in this order, one after the
            other, so that a process that drains still reaches what it needs.
        health: the address of a gRPC health service, or a URL that answers 200 when ready:
            `http://host:port/path`, or `http+unix:/socket#/path`; or a `nats://host:port`.
        address: where its callers reach it: `host:port` or `unix:/path`.
    """

    name: str
    group: str
    argv: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    health: str
    address: str


def mesh_processes(layout: Layout, ports: Mapping[str, int]) -> list[ProcessSpec]:
    """Returns the processes of the mesh in the order in which they are started."""
    return [
        _nats(layout, ports),
        *(_triton(name, layout, ports) for name in replicas(ports, "triton")),
        *(
            _service(replica, service, layout, ports)
            for service in _PEERS
            for replica in replicas(ports, service)
        ),
        _edge(layout, ports),
        *_edge_certificate(layout, ports),
    ]


def system_environment() -> dict[str, str]:
    """Returns the variables of the caller's environment that every process gets."""
    kept = {key: os.environ[key] for key in _SYSTEM_SETTINGS if key in os.environ}
    return {"PATH": f"{PROGRAMS}:/usr/local/bin:/usr/bin:/bin", **kept}


def _nats(layout: Layout, ports: Mapping[str, int]) -> ProcessSpec:
    return ProcessSpec(
        name="nats",
        group="backends",
        argv=[str(binaries.program("nats-server")), "-c", str(nats_config(layout))],
        health=f"nats://{address(ports, 'nats.client')}",
        address=address(ports, "nats.client"),
    )


def _triton(backend: str, layout: Layout, ports: Mapping[str, int]) -> ProcessSpec:
    arguments = {
        "--home": str(layout.home),
        "--backend-id": backend,
        "--grpc-address": triton_address(layout, ports, backend),
        "--metrics-address": address(ports, f"{backend}.metrics"),
        "--control-key-file": str(keys.triton_control_key_path(layout.home)),
        "--tls-folder": str(tls_folder(layout.home)),
    }
    return ProcessSpec(
        name=backend,
        group="backends",
        argv=[
            sys.executable, "-m", "deploy.triton.run",
            *(word for pair in arguments.items() for word in pair),
        ],
        health=triton_address(layout, ports, backend),
        address=triton_address(layout, ports, backend),
    )  # fmt: skip


def _edge(layout: Layout, ports: Mapping[str, int]) -> ProcessSpec:
    return ProcessSpec(
        name="envoy",
        group="edge",
        argv=render.argv(edge_settings(layout, ports), program=str(binaries.program("envoy"))),
        health=f"http+{inner_address(layout, ports, 'envoy.admin')}#/ready",
        address=address(ports, "envoy.edge"),
    )


def _edge_certificate(layout: Layout, ports: Mapping[str, int]) -> Iterator[ProcessSpec]:
    """Yields the process that gives Envoy new certificates, where the edge has TLS."""
    edge = layout.edge
    if edge.certificate_file is None:
        return
    arguments = {
        "--certificate": edge.certificate_file,
        "--key": edge.key_file,
        "--folder": layout.edge_tls,
    }
    yield replace(
        _edge(layout, ports),  # whose readiness says that there is a certificate
        name="edge_certificate",
        argv=[
            sys.executable, "-m", "deploy.local.edge_certificate",
            *(str(word) for pair in arguments.items() for word in pair),
        ],
    )  # fmt: skip


def _service(name: str, service: str, layout: Layout, ports: Mapping[str, int]) -> ProcessSpec:
    environment = {
        "HEADRACE_HOME": str(layout.home),
        "HEADRACE_LISTEN_ADDRESS": inner_address(layout, ports, f"{name}.grpc"),
        "HEADRACE_METRICS_ADDRESS": address(ports, f"{name}.metrics"),
        "HEADRACE_INPUT_HASH_KEY_FILE": str(keys.input_hash_key_path(layout.home)),
        "HEADRACE_DRAIN_SECONDS": str(DRAIN_SECONDS),
        **_tls(tls_files(layout.home, service)),
    }
    for peer in _PEERS[service]:
        if peer == "nats":
            environment["HEADRACE_NATS_URL"] = f"nats://{address(ports, 'nats.client')}"
            environment |= {
                f"HEADRACE_{setting}_CREDENTIALS_FILE": str(
                    keys.nats_credentials_path(layout.home, user)
                )
                for setting, user in (("NATS", service), ("NATS_SYSTEM", SYSTEM_USER))
            }
        else:
            environment[f"HEADRACE_{peer.upper()}_ADDRESS"] = one_target(
                addresses(layout, ports, peer)
            )
    if service == "inference":
        environment |= _proxies()
    if service in routes.HTTP_CLUSTERS.values():
        environment["HEADRACE_HTTP_LISTEN_ADDRESS"] = inner_address(layout, ports, f"{name}.http")
    if service in routes.STREAM_CLUSTERS.values():
        environment["HEADRACE_STREAM_LISTEN_ADDRESS"] = inner_address(
            layout, ports, f"{name}.streams"
        )
    if service == "pool_agent":
        backend = f"triton-{replicas(ports, service).index(name)}"
        environment |= {
            "HEADRACE_BACKEND_ID": backend,
            "HEADRACE_TRITON_ADDRESS": triton_address(layout, ports, backend),
            "HEADRACE_TRITON_CONTROL_KEY_FILE": str(keys.triton_control_key_path(layout.home)),
            "HEADRACE_MODEL_REPOSITORY": str(layout.home / "triton" / backend / "models"),
        }
    return ProcessSpec(
        name=name,
        group="services",
        argv=[sys.executable, "-m", f"services.{service}"],
        environment=_user_environment() | environment,
        health=inner_address(layout, ports, f"{name}.grpc"),
        address=inner_address(layout, ports, f"{name}.grpc"),
    )


def _tls(files: TlsFiles) -> dict[str, str]:
    return {
        "HEADRACE_TLS_CA_FILE": str(files.ca),
        "HEADRACE_TLS_CERTIFICATE_FILE": str(files.certificate),
        "HEADRACE_TLS_KEY_FILE": str(files.key),
    }


def _proxies() -> dict[str, str]:
    """Returns the caller's proxies, which programs name in upper or lower case."""
    found = {key: os.environ.get(key) or os.environ.get(key.lower()) for key in _PROXY_SETTINGS}
    return {key: value for key, value in found.items() if value}


def _user_environment() -> dict[str, str]:
    return {
        key: value
        for key, value in os.environ.items()
        if key.startswith(_USER_SETTING_PREFIXES) and key not in _NOT_FOR_ALL
    }
