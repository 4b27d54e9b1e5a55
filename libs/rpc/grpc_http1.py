"""A method of gRPC that streams its answer, over HTTP/1.1.

The edge takes gRPC's HTTP/2 apart and passes the same bytes on in chunks, with the status in the
trailers: a message costs this process a write, where one of `grpc.aio` costs it a queue, a thread
and a wake-up. The handler is the servicer's own.
"""

from __future__ import annotations

import asyncio
import base64
import zlib
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import quote

import grpc
from google.protobuf.message import DecodeError, Message
from opentelemetry import trace

from libs.clock import Clock
from libs.errors import HeadraceError, InvalidArgument, Unimplemented
from libs.http1.exchange import Exchange
from libs.http_headers import header_lines
from libs.rpc.call_observer import MAX_REQUEST_BYTES, CallObserver, within_deadline
from libs.rpc.framing import PREFIX, framed
from libs.rpc.status import DETAILS_KEY, as_headrace_error, to_status

_CONTENT_TYPE = "application/grpc"
_WINDOW_BITS = {"gzip": 31, "deflate": 15}
_ENCODINGS = ",".join(("identity", *_WINDOW_BITS))
_TIMEOUT_DIGITS = 8
_TIMEOUT_UNITS = {"H": 3600, "M": 60, "S": 1, "m": 1e-3, "u": 1e-6, "n": 1e-9}
# Whoever does not read gets no status: it would wait behind what was written before.
ENDING_SECONDS = 5.0

# As OpenTelemetry's semantic conventions have it for servers.
_SERVERS_FAULT = frozenset({"INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNIMPLEMENTED"})

Behavior = Callable[[Any, Any], Awaitable[None]]


class GrpcHttp1Handler:
    """One method.

    Attributes:
        name: its path.
    """

    def __init__(
        self, name: str, behavior: Behavior, *, request_type: type[Message], clock: Clock
    ) -> None:
        """Makes the method `/package.Service/Method` of a servicer's method that writes."""
        self.name = name
        self._behavior = behavior
        self._request_type = request_type
        self._clock = clock

    async def answer(self, exchange: Exchange) -> None:
        """Answers a call, and tells metrics, span and log how its work ended."""
        handling = CallObserver(self.name, self._clock)
        call = GrpcCall(exchange, self._clock)
        status = "CANCELLED"
        try:
            error = await self._handle(call, exchange)
            status = error.code if error else "OK"
            await call.end(error)
        except ConnectionError:
            if not exchange.caller_has_gone:
                raise
        finally:
            handling.end(status)
            span = trace.get_current_span()
            if span.is_recording():
                self._describe(span, status)

    async def _handle(self, call: GrpcCall, exchange: Exchange) -> HeadraceError | None:
        try:
            await within_deadline(self._work(call), call.time_remaining())
        except Exception as raised:  # the boundary: everything becomes a status
            if isinstance(raised, ConnectionError) and exchange.caller_has_gone:
                raise
            return as_headrace_error(raised)
        return None

    async def _work(self, call: GrpcCall) -> None:
        await self._behavior(self._parse(call.message()), call)

    def _parse(self, message: bytes) -> Message:
        try:
            return self._request_type.FromString(message)
        except DecodeError as error:
            name = self._request_type.DESCRIPTOR.full_name
            raise InvalidArgument(f"the message is no {name}", reason="INVALID_FIELD") from error

    def _describe(self, span: trace.Span, status: str) -> None:
        service, _, method = self.name.removeprefix("/").rpartition("/")
        span.set_attributes(
            {
                "rpc.system": "grpc",
                "rpc.service": service,
                "rpc.method": method,
                "rpc.grpc.status_code": grpc.StatusCode[status].value[0],
            }
        )
        if status in _SERVERS_FAULT:
            span.set_status(trace.StatusCode.ERROR)


class GrpcCall:
    """A call that runs, as a servicer sees it: what it uses of `grpc.aio.ServicerContext`."""

    def __init__(self, exchange: Exchange, clock: Clock) -> None:
        self._exchange = exchange
        self._clock = clock
        timeout = _timeout_seconds(exchange.headers.get("grpc-timeout", ""))
        self._deadline = None if timeout is None else clock.monotonic_seconds() + timeout

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns the headers."""
        return tuple(self._exchange.headers.items())

    def time_remaining(self) -> float | None:
        """Returns the seconds until the caller gives up; None: it does not."""
        if self._deadline is None:
            return None
        return max(0.0, self._deadline - self._clock.monotonic_seconds())

    async def write(self, message: Message) -> None:
        """Writes a message; waits while its reader lags."""
        data = framed(message.SerializeToString())
        await self._exchange.part(data, content_type=_CONTENT_TYPE)

    async def write_together(self, messages: Iterable[Message]) -> None:
        """As `write`, with several messages in one write."""
        data = b"".join(framed(message.SerializeToString()) for message in messages)
        await self._exchange.part(data, content_type=_CONTENT_TYPE)

    def message(self) -> bytes:
        """Returns the request.

        Raises:
            InvalidArgument: there is not one message, or it is too large.
            Unimplemented: it is compressed in a way that nobody here knows.
        """
        if self._exchange.too_large:
            raise _too_large("the message has")
        body = self._exchange.body
        if len(body) < PREFIX.size:
            raise InvalidArgument("a call without a message", reason="INVALID_FIELD")
        compressed, length = PREFIX.unpack_from(body)
        if len(body) != PREFIX.size + length:
            raise InvalidArgument("not one whole message", reason="INVALID_FIELD")
        message = body[PREFIX.size :]
        return self._decompressed(message) if compressed else message

    def _decompressed(self, message: bytes) -> bytes:
        encoding = self._exchange.headers.get("grpc-encoding", "identity")
        if encoding not in _WINDOW_BITS:
            raise Unimplemented(
                f"no message encoding {encoding}; there are {_ENCODINGS}", reason="INVALID_FIELD"
            )
        unpacking = zlib.decompressobj(_WINDOW_BITS[encoding])
        try:
            unpacked = unpacking.decompress(message, MAX_REQUEST_BYTES + 1)
        except zlib.error as error:
            raise InvalidArgument(
                f"the message is no {encoding}", reason="INVALID_FIELD"
            ) from error
        if len(unpacked) > MAX_REQUEST_BYTES:
            raise _too_large("unpacked, the message has")
        if not unpacking.eof:
            raise InvalidArgument(f"the message is no whole {encoding}", reason="INVALID_FIELD")
        return unpacked

    async def end(self, error: HeadraceError | None) -> None:
        """Writes the status, behind what was written before, and waits until it has left."""
        trailers = _trailers(error)
        exchange = self._exchange
        if exchange.status is None:  # nothing was written: it takes the place of the headers
            trailers["grpc-accept-encoding"] = _ENCODINGS
            exchange.whole(b"", content_type=_CONTENT_TYPE, headers=trailers)
            return
        exchange.end(header_lines(trailers).encode())
        try:
            async with asyncio.timeout(ENDING_SECONDS):
                await exchange.drain()
        except TimeoutError:
            exchange.cut()


def _trailers(error: HeadraceError | None) -> dict[str, str]:
    if error is None:
        return {"grpc-status": "0"}
    status = to_status(error)
    details = base64.b64encode(status.SerializeToString()).rstrip(b"=").decode()
    return {
        "grpc-status": str(status.code),
        # What is not printable is percent-encoded, as gRPC has it; spaces are, too, because
        # HTTP/1.1 drops those at the ends, and clients compare the message with the details.
        "grpc-message": quote(status.message, safe="!\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"),
        DETAILS_KEY: details,
    }


def _timeout_seconds(text: str) -> float | None:
    """Returns what `grpc-timeout` says, eight digits and a unit at most; None: nothing."""
    digits, unit = text[:-1], text[-1:]
    if not (digits.isascii() and digits.isdecimal()) or unit not in _TIMEOUT_UNITS:
        return None
    if len(digits) > _TIMEOUT_DIGITS:
        return None
    return int(digits) * _TIMEOUT_UNITS[unit]


def _too_large(what: str) -> InvalidArgument:
    text = f"{what} more than {MAX_REQUEST_BYTES} bytes"
    return InvalidArgument.too_large("", text, limit_bytes=MAX_REQUEST_BYTES)
