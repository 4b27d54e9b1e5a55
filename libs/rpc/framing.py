"""gRPC's framing: each message in a body follows a prefix."""

from __future__ import annotations

import struct

PREFIX = struct.Struct(">BI")  # the compressed flag, and the length


def framed(message: bytes) -> bytes:
    """Returns an uncompressed message with its prefix."""
    return PREFIX.pack(0, len(message)) + message
