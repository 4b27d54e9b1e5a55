"""The addresses of a mesh.

What is inside listens on Unix sockets, or at ports with TLS. Ports are chosen once, and kept until
another program takes one: of the edge, of NATS, which knows no Unix sockets, and of what Prometheus
reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from deploy.errors import CliError
from deploy.host import LOOPBACK, free_ports, is_free
from deploy.local.layout import DEFAULT_EDGE_PORT, Layout
from libs.addresses import UNIX_PREFIX

EDGE = "envoy.edge"
# The services that always have one process.
_SERVICES = ("registry", "router", "embedding_cache", "cost", "jobs", "worker")


def replicas(ports: Mapping[str, int], name: str) -> list[str]:
    """Returns the names of a service's processes: `inference`, `inference-1`, ..."""
    found = [key.removesuffix(".metrics") for key in ports if key.endswith(".metrics")]
    return sorted(
        (key for key in found if key.rpartition("-")[0] == name or key == name), key=_replica_number
    )


def port_names(layout: Layout) -> list[str]:
    """Returns the names of all ports of a mesh, such as `registry.metrics`."""
    services = [
        *_SERVICES,
        *_numbered("inference", layout.inference_replicas),
        *_numbered("pool_agent", layout.triton_backends),
    ]
    return [
        EDGE, "envoy.metrics", "nats.client",
        *(f"triton-{number}.metrics" for number in range(layout.triton_backends)),
        *(f"{service}.metrics" for service in services),
        *(_inner_names(layout, services) if layout.transport == "tls" else ()),
    ]  # fmt: skip


def _inner_names(layout: Layout, services: Sequence[str]) -> list[str]:
    return [
        *(f"{service}.grpc" for service in services),
        *(f"triton-{number}.grpc" for number in range(layout.triton_backends)),
        *(
            f"{replica}.{server}"
            for replica in _numbered("inference", layout.inference_replicas)
            for server in ("http", "streams")
        ),
        "embedding_cache.http",
    ]


def _numbered(name: str, count: int) -> list[str]:
    return [name, *(f"{name}-{number}" for number in range(1, count))]


def _replica_number(name: str) -> int:
    number = name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def read_ports(layout: Layout) -> dict[str, int]:
    """Returns the ports by name; empty if no mesh was started in this folder."""
    try:
        kept = json.loads(layout.ports_file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return {str(name): int(port) for name, port in kept.items()} if isinstance(kept, dict) else {}


def choose_ports(layout: Layout) -> Mapping[str, int]:
    """Chooses and saves the ports of a mesh that does not run.

    A port stays the same as long as it is free; otherwise another one replaces it.

    Raises:
        CliError: the edge's port is taken.
    """
    edge_port = layout.edge_port or DEFAULT_EDGE_PORT
    if not is_free(edge_port, layout.edge.address):
        raise CliError(
            f"the edge cannot listen on port {edge_port} of {layout.edge.address}: another program "
            "has it, or this machine does not have the address; set HEADRACE_EDGE_PORT or "
            "HEADRACE_EDGE_ADDRESS"
        )
    kept = read_ports(layout) | {EDGE: edge_port}
    names = port_names(layout)
    ports = {name: kept[name] for name in names if name in kept and is_free(kept[name])}
    missing = [name for name in names if name not in ports]
    ports |= zip(missing, free_ports(len(missing), taken=ports.values()), strict=True)
    layout.ports_file.write_text(json.dumps(ports, indent=2))
    return ports


def address(ports: Mapping[str, int], name: str) -> str:
    """Returns `127.0.0.1:port`."""
    return f"{LOOPBACK}:{ports[name]}"


def inner_address(layout: Layout, ports: Mapping[str, int], name: str) -> str:
    """Returns the address of something inside the mesh, such as `registry.grpc`.

    It is a Unix socket, or a port with TLS where the mesh was started so.
    """
    return address(ports, name) if name in ports else f"{UNIX_PREFIX}{layout.sockets / name}"


def triton_address(layout: Layout, ports: Mapping[str, int], backend: str) -> str:
    """Returns the address of a Triton, which appends the number of a port to any address.

    Its socket is in a folder of its own, the only one of the sockets' that it may write to.
    """
    name = f"{backend}.grpc"
    if name in ports:
        return address(ports, name)
    return f"{UNIX_PREFIX}{layout.sockets / backend / 'grpc'}:1"
