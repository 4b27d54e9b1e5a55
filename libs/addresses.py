"""Addresses inside a mesh: `host:port`, or `unix:/path` of a Unix socket.

gRPC knows both forms. A socket lies in a folder that only the mesh's account may enter, so the
kernel keeps the machine's other accounts out; to a port of the loopback interface any of them can
connect.
"""

from __future__ import annotations

import socket

UNIX_PREFIX = "unix:"


def unix_path(address: str) -> str | None:
    """Returns the path of a Unix socket, or None if the address is a `host:port`."""
    return address.removeprefix(UNIX_PREFIX) if address.startswith(UNIX_PREFIX) else None


def host_and_port(address: str) -> tuple[str, int]:
    """Splits a `host:port`; an IPv6 host may have brackets.

    Raises:
        ValueError: it is not one.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"invalid address {address!r}; use host:port or unix:/path")
    return host.strip("[]"), int(port)


def connect(address: str, *, timeout_seconds: float) -> socket.socket:
    """Returns a connection whose operations may block for `timeout_seconds` each.

    Raises:
        OSError: nothing listens there, `TimeoutError` included.
        ValueError: the address is invalid.
    """
    path = unix_path(address)
    if path is None:
        return socket.create_connection(host_and_port(address), timeout_seconds)
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(timeout_seconds)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


def authority(address: str) -> str:
    """Returns what a client names as the server's host in its requests."""
    return "localhost" if unix_path(address) is not None else address


def one_target(addresses: list[str]) -> str:
    """Returns the target of a gRPC channel: one address, or several of a kind to balance over."""
    if len(addresses) == 1:
        return addresses[0]
    paths = [path for address in addresses if (path := unix_path(address)) is not None]
    return f"{UNIX_PREFIX}{','.join(paths)}" if paths else f"ipv4:{','.join(addresses)}"
