"""The machine: where the checkout is, the loopback address, free ports."""

from __future__ import annotations

import itertools
import random
import socket
from collections.abc import Iterable
from pathlib import Path

from deploy.errors import CliError

REPOSITORY = Path(__file__).resolve().parents[1]
LOOPBACK = "127.0.0.1"
# Below the kernel's ephemeral ports, which any outgoing connection may take at any moment.
LOWEST_PORT = 20_000
_BLOCK_PORTS = 64  # more than a mesh of the default shape has
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


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
        raise CliError(f"{count} ports above {LOWEST_PORT} are needed, and {len(found)} are free")
    return found
