"""How gRPC puts messages into a body: a prefix before each."""

from __future__ import annotations

import struct

PREFIX = struct.Struct(">BI")  # whether it is compressed, and its length


def framed(message: bytes) -> bytes:
    """Returns a message, uncompressed, with its prefix."""
    return PREFIX.pack(0, len(message)) + message
