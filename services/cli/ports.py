"""The ports of a mesh: picked once, kept as long as nobody else takes them."""

from __future__ import annotations

import itertools
import json
import random
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

from services.cli.layout import DEFAULT_EDGE_PORT, LOOPBACK, CannotRun, Layout

EDGE = "envoy.edge"
# Those of which there is one.
_SERVICES = ("registry", "router", "embedding_cache", "cost", "jobs", "worker")
# Below the kernel's ephemeral ports, which any outgoing connection may take at any moment.
LOWEST_PORT = 20_000
_BLOCK_PORTS = 64  # more than a mesh of the default shape has
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def replicas(ports: Mapping[str, int], name: str) -> list[str]:
    """Returns the processes of a service that a mesh has: `inference`, `inference-1`, ..."""
    found = [key.removesuffix(".grpc") for key in ports if key.endswith(".grpc")]
    return sorted(
        (key for key in found if key.rpartition("-")[0] == name or key == name), key=_rank
    )


def port_names(layout: Layout) -> list[str]:
    """Returns the names of all ports of a mesh."""
    services = [
        *_SERVICES,
        *_numbered("inference", layout.inference_replicas),
        *_numbered("pool_agent", layout.triton_backends),
    ]
    return [
        EDGE, "envoy.admin", "nats.client", "nats.monitor",
        *(
            f"triton-{number}.{port}"
            for number in range(layout.triton_backends)
            for port in ("grpc", "http", "metrics")
        ),
        *(f"{service}.{port}" for service in services for port in ("grpc", "metrics")),
        *(f"{replica}.http" for replica in _numbered("inference", layout.inference_replicas)),
    ]  # fmt: skip


def _numbered(name: str, count: int) -> list[str]:
    return [name, *(f"{name}-{number}" for number in range(1, count))]


def _rank(name: str) -> int:
    number = name.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def read_ports(layout: Layout) -> dict[str, int]:
    """Returns the ports by name, such as `registry.grpc`; empty where there was no mesh yet."""
    try:
        kept = json.loads(layout.ports_file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return {str(name): int(port) for name, port in kept.items()} if isinstance(kept, dict) else {}


def keep_ports(layout: Layout) -> Mapping[str, int]:
    """Returns the ports of a mesh that does not run: those it had, new ones for what is taken.

    Raises:
        CannotRun: the edge's port is taken.
    """
    edge_port = layout.edge_port or DEFAULT_EDGE_PORT
    if not is_free(edge_port):
        raise CannotRun(f"port {edge_port} is taken by another program; set HEADRACE_EDGE_PORT")
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


def is_free(port: int) -> bool:
    """Tells whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def free_ports(count: int, *, taken: Iterable[int] = ()) -> list[int]:
    """Returns ports that nothing listens on now and that are none of those taken.

    Neighbours, as far as they are free, from a random place: two meshes that start at the same time
    meet only if both draw the same place, not whenever one port of each is the same.

    Raises:
        CannotRun: there are not so many.
    """
    ephemeral = int(_EPHEMERAL.read_text().split()[0]) if _EPHEMERAL.exists() else 2**15
    blocks = list(range(LOWEST_PORT, max(ephemeral, LOWEST_PORT + 1000), _BLOCK_PORTS))
    random.SystemRandom().shuffle(blocks)
    refused = set(taken)
    candidates = (port for block in blocks for port in range(block, block + _BLOCK_PORTS))
    free = (port for port in candidates if port not in refused and is_free(port))
    found = list(itertools.islice(free, count))
    if len(found) < count:
        raise CannotRun(f"{count} ports above {LOWEST_PORT} are needed, and {len(found)} are free")
    return found
