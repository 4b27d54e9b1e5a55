"""HTTP/2 frames as bytes (RFC 9113), written independently of the library under test."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from h2.errors import ErrorCodes
from h2.settings import SettingCodes

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DEFAULT_WINDOW_BYTES = 65_535
MAX_STREAM_ID = 2**31 - 1

END_STREAM = 0x1
ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8


class FrameType(IntEnum):
    """Types of frames."""

    DATA = 0x0
    HEADERS = 0x1
    RST_STREAM = 0x3
    SETTINGS = 0x4
    PUSH_PROMISE = 0x5
    PING = 0x6
    GOAWAY = 0x7
    WINDOW_UPDATE = 0x8
    CONTINUATION = 0x9


class Frame(NamedTuple):
    """One frame. `payload` is still padded."""

    type: int
    flags: int
    stream_id: int
    payload: bytes


def number(payload: bytes, at: int = 0) -> int:
    """Returns the 31 bits at an offset."""
    value: int = struct.unpack_from(">I", payload, at)[0]
    return value & MAX_STREAM_ID


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Returns a frame."""
    head = struct.pack(">IBI", len(payload) << 8 | kind, flags, stream_id)
    return head + payload


def settings(pairs: dict[SettingCodes, int]) -> bytes:
    """Returns a SETTINGS frame."""
    payload = b"".join(struct.pack(">HI", key, value) for key, value in pairs.items())
    return frame(FrameType.SETTINGS, 0, 0, payload)


def window_update(stream_id: int, size: int) -> bytes:
    """Returns a frame that opens the window of a stream; stream 0 is the connection."""
    return frame(FrameType.WINDOW_UPDATE, 0, stream_id, struct.pack(">I", size))


def rst_stream(stream_id: int, code: ErrorCodes) -> bytes:
    """Returns a frame that ends a stream."""
    return frame(FrameType.RST_STREAM, 0, stream_id, struct.pack(">I", code))


def goaway(last_stream_id: int, code: int = 0) -> bytes:
    """Returns a frame that refuses further streams."""
    return frame(FrameType.GOAWAY, 0, 0, struct.pack(">II", last_stream_id, code) + b"why")


def data(stream_id: int, payload: bytes, *, padding: int | None = None, end: bool = False) -> bytes:
    """Returns a DATA frame."""
    flags = end * END_STREAM
    if padding is not None:
        flags |= PADDED
        payload = bytes((padding,)) + payload + bytes(padding)
    return frame(FrameType.DATA, flags, stream_id, payload)


def literal(name: str, value: str) -> bytes:
    """Returns a header field without indexing (RFC 7541, 6.2.2)."""
    return b"\x00" + _string(name) + _string(value)


def _string(text: str) -> bytes:
    raw, more = text.encode(), len(text.encode()) - 0x7F
    if more < 0:
        return bytes((len(raw),)) + raw
    length = bytearray((0x7F,))
    while more > 0x7F:
        length.append(more & 0x7F | 0x80)
        more >>= 7
    return bytes(length) + bytes((more,)) + raw
