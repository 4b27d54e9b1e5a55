"""HTTP/2 frames as bytes, for a client (RFC 9113)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_FRAME_BYTES = 16_384  # what a peer may send unless it is told otherwise
DEFAULT_WINDOW_BYTES = 65_535
MAX_WINDOW_BYTES = 2**31 - 1
MAX_STREAM_ID = 2**31 - 1

END_STREAM = 0x1
ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITY = 0x20

_HEAD = struct.Struct(">BHBBI")  # length in 8 + 16 bits, type, flags, stream
_U32 = struct.Struct(">I")
_SETTING = struct.Struct(">HI")
_HEAD_BYTES = _HEAD.size
_PRIORITY_BYTES = 5


class FrameType(IntEnum):
    """What a frame is."""

    DATA = 0x0
    HEADERS = 0x1
    RST_STREAM = 0x3
    SETTINGS = 0x4
    PUSH_PROMISE = 0x5
    PING = 0x6
    GOAWAY = 0x7
    WINDOW_UPDATE = 0x8
    CONTINUATION = 0x9


class Setting(IntEnum):
    """A setting that this client sends or heeds."""

    ENABLE_PUSH = 0x2
    MAX_CONCURRENT_STREAMS = 0x3
    INITIAL_WINDOW_SIZE = 0x4
    MAX_FRAME_SIZE = 0x5


class ErrorCode(IntEnum):
    """Why a stream or a connection ends."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    ENHANCE_YOUR_CALM = 0xB


class ProtocolViolationError(Exception):
    """The peer does not speak HTTP/2: the connection must end.

    Attributes:
        code: what it is told.
    """

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class Frame(NamedTuple):
    """One frame. `payload` is still padded."""

    type: int
    flags: int
    stream_id: int
    payload: bytes


class FrameReader:
    """Cuts what arrives into frames; it keeps less than one frame."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yields the frames that are complete now.

        Raises:
            ProtocolViolationError: a frame is longer than this client allows.
        """
        if self._rest:
            data = self._rest + data
            self._rest = b""
        at, end = 0, len(data)
        while end - at >= _HEAD_BYTES:
            high, low, kind, flags, stream_id = _HEAD.unpack_from(data, at)
            length = high << 16 | low
            if length > MAX_FRAME_BYTES:
                raise ProtocolViolationError(
                    ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} bytes"
                )
            body = at + _HEAD_BYTES
            if body + length > end:
                break
            at = body + length
            yield Frame(kind, flags, stream_id & MAX_STREAM_ID, data[body:at])
        self._rest = data[at:]


def content(frame: Frame) -> bytes:
    """Returns what a DATA or HEADERS frame carries between padding and priority.

    Raises:
        ProtocolViolationError: there is less in it than its flags say.
    """
    payload = frame.payload
    start, end = 0, len(payload)
    if frame.flags & PADDED:
        start = 1
        end -= payload[0] if payload else end + 1
    if frame.type == FrameType.HEADERS and frame.flags & PRIORITY:
        start += _PRIORITY_BYTES
    if start > end:
        raise ProtocolViolationError(ErrorCode.PROTOCOL_ERROR, "padding longer than its frame")
    return payload[start:end] if frame.flags & (PADDED | PRIORITY) else payload


def number(payload: bytes, at: int = 0) -> int:
    """Returns the 31 bits there.

    Raises:
        ProtocolViolationError: the payload is too short.
    """
    if len(payload) < at + _U32.size:
        raise ProtocolViolationError(ErrorCode.FRAME_SIZE_ERROR, "a frame that is too short")
    value: int = _U32.unpack_from(payload, at)[0]
    return value & MAX_WINDOW_BYTES


def read_settings(payload: bytes) -> list[tuple[int, int]]:
    """Returns the pairs of a SETTINGS frame.

    Raises:
        ProtocolViolationError: it has half a pair.
    """
    if len(payload) % _SETTING.size:
        raise ProtocolViolationError(ErrorCode.FRAME_SIZE_ERROR, "half a setting")
    return [(key, value) for key, value in _SETTING.iter_unpack(payload)]


def frame(kind: FrameType, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Returns a frame."""
    length = len(payload)
    return _HEAD.pack(length >> 16, length & 0xFFFF, kind, flags, stream_id) + payload


def settings(pairs: dict[Setting, int]) -> bytes:
    """Returns a SETTINGS frame."""
    payload = b"".join(_SETTING.pack(key, value) for key, value in pairs.items())
    return frame(FrameType.SETTINGS, 0, 0, payload)


def window_update(stream_id: int, size: int) -> bytes:
    """Returns a frame that lets the peer send so many bytes more; stream 0: the connection."""
    return frame(FrameType.WINDOW_UPDATE, 0, stream_id, _U32.pack(size))


def rst_stream(stream_id: int, code: ErrorCode) -> bytes:
    """Returns a frame that ends a stream."""
    return frame(FrameType.RST_STREAM, 0, stream_id, _U32.pack(code))


def goaway(code: ErrorCode) -> bytes:
    """Returns a frame that ends a connection; a server of a client's has begun no stream."""
    return frame(FrameType.GOAWAY, 0, 0, _U32.pack(0) + _U32.pack(code))


def headers(stream_id: int, block: bytes) -> bytes:
    """Returns the frames of a header block, in which no stream ends."""
    first, rest = block[:MAX_FRAME_BYTES], block[MAX_FRAME_BYTES:]
    made = [frame(FrameType.HEADERS, 0 if rest else END_HEADERS, stream_id, first)]
    while rest:
        first, rest = rest[:MAX_FRAME_BYTES], rest[MAX_FRAME_BYTES:]
        flags = 0 if rest else END_HEADERS
        made.append(frame(FrameType.CONTINUATION, flags, stream_id, first))
    return b"".join(made)


def error_name(code: int) -> str:
    """Returns what an error code is called."""
    try:
        return ErrorCode(code).name
    except ValueError:
        return f"code {code}"


def literal(name: str, value: str) -> bytes:
    """Returns a header field that enters no table (RFC 7541, 6.2.2), so that blocks can be joined.

    Raises:
        UnicodeEncodeError: it is not ASCII.
    """
    return b"\x00" + _string(name) + _string(value)


def _string(text: str) -> bytes:
    raw = text.encode("ascii")
    return _integer(len(raw)) + raw


def _integer(value: int) -> bytes:
    """Returns an integer behind one bit that is 0 (RFC 7541, 5.1)."""
    most = 0x7F
    if value < most:
        return bytes((value,))
    made = bytearray((most,))
    value -= most
    while value > most:
        made.append(value & most | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)
