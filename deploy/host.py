"""The machine: the repository's folder, installed programs, the loopback address, free ports."""

from __future__ import annotations

import itertools
import random
import socket
import sys
from collections.abc import Iterable
from pathlib import Path

from deploy.errors import CliError

REPOSITORY = Path(__file__).resolve().parents[1]
# The programs of the environment that this Python belongs to: envoy, nats-server, headrace.
PROGRAMS = Path(sys.executable).parent
LOOPBACK = "127.0.0.1"
# Below the kernel's ephemeral ports, which any outgoing connection may take at any moment.
LOWEST_PORT = 20_000
_BLOCK_PORTS = 64  # more than a mesh of the default shape has
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """Returns whether a server can listen on this port of an IP address now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_ports(count: int, *, taken: Iterable[int] = ()) -> list[int]:
    """Returns ports that nothing listens on now, without those in `taken`.

    The ports are adjacent as far as possible and start at a random block: two meshes that start at
    the same time collide only if both draw the same block, not whenever a single port is the same.

    Raises:
        CliError: there are not enough free ports.
    """
    ephemeral = int(_EPHEMERAL.read_text().split()[0]) if _EPHEMERAL.exists() else 2**15
    blocks = list(range(LOWEST_PORT, max(ephemeral, LOWEST_PORT + 1000), _BLOCK_PORTS))
    random.SystemRandom().shuffle(blocks)
    refused = set(taken)
    candidates = (port for block in blocks for port in range(block, block + _BLOCK_PORTS))
    free = (port for port in candidates if port not in refused and is_free(port))
    found = list(itertools.islice(free, count))
    if len(found) < count:
        raise CliError(
            f"{count} free ports from {LOWEST_PORT} on are needed, and only {len(found)} are free; "
            "stop programs that listen there"
        )
    return found
