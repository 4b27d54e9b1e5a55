"""A gRPC method that streams its response, over HTTP/1.1.

The edge translates gRPC's HTTP/2 and passes on the same bytes in chunks, with the status in the
trailers: a message costs this process one write, where one of `grpc.aio` costs a queue, a thread
and a wake-up. The servicer's own method is called.
"""

from __future__ import annotations

import asyncio
import base64
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any
from urllib.parse import quote

from google.protobuf.message import Message

from libs.clock import Clock
from libs.errors import HeadraceError, InvalidArgument, Unimplemented
from libs.http1 import Exchange
from libs.http_headers import header_lines
from libs.rpc import grpc_timeout
from libs.rpc.access import required_scope
from libs.rpc.call_observer import GrpcObserver
from libs.rpc.deadlines import Deadline, Deadlines
from libs.rpc.framing import PREFIX, framed
from libs.rpc.identity import Identity, identity_in
from libs.rpc.served_call import (
    MAX_REQUEST_BYTES,
    check_arrived,
    read_message,
    serve_call,
    too_large,
)
from libs.rpc.status import DETAILS_KEY, to_status

_CONTENT_TYPE = "application/grpc"
_WINDOW_BITS = {"gzip": 31, "deflate": 15}
_ENCODINGS = ",".join(("identity", *_WINDOW_BITS))
# A client that does not read would never get the status: its connection is closed.
ENDING_SECONDS = 5.0

Behavior = Callable[[Any, Any], Awaitable[None]]


class GrpcHttp1Handler:
    """One method.

    Attributes:
        name: its path.
        clock: the time.
        deadlines: of the calls that run.
    """

    def __init__(
        self,
        name: str,
        behavior: Behavior,
        *,
        request_type: type[Message],
        clock: Clock,
        scope_of: Callable[[str], str] = required_scope,
    ) -> None:
        """Creates the method `/package.Service/Method` of a servicer's method that writes."""
        self.name = name
        self._behavior = behavior
        self._request_type = request_type
        self.clock = clock
        self.deadlines = Deadlines()
        self._observer = GrpcObserver(name)
        self._scope = scope_of(name)

    async def answer(self, exchange: Exchange) -> None:
        """Answers a call."""
        call = GrpcCall(exchange, self)
        await serve_call(call, self._observer, self.clock, scope=self._scope)

    async def handle(self, message: bytes, call: GrpcCall) -> None:
        """Calls the servicer's method.

        Raises:
            InvalidArgument: the message cannot be parsed.
        """
        request = read_message(self._request_type.FromString, message)
        await self._behavior(request, call)


class GrpcCall:
    """A running call, with what servicers use of `grpc.aio.ServicerContext`."""

    def __init__(self, exchange: Exchange, handler: GrpcHttp1Handler) -> None:
        self._exchange = exchange
        self._handler = handler
        self._deadline_seconds: float | None = None

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns the headers."""
        return tuple(self._exchange.request.headers.items())

    def time_remaining(self) -> float | None:
        """Returns the seconds until the caller's deadline; None: it has none."""
        if self._deadline_seconds is None:
            return None
        return max(0.0, self._deadline_seconds - self._handler.clock.monotonic_seconds())

    async def write(self, message: Message) -> None:
        """Writes a message; waits while the client reads too slowly."""
        data = framed(message.SerializeToString())
        await self._exchange.send_chunk(data, content_type=_CONTENT_TYPE)

    async def write_together(self, messages: Iterable[Message]) -> None:
        """As `write`, with several messages in one write."""
        data = b"".join(framed(message.SerializeToString()) for message in messages)
        await self._exchange.send_chunk(data, content_type=_CONTENT_TYPE)

    def message(self) -> bytes:
        """Returns the request.

        Raises:
            InvalidArgument: the request breaks a rule of HTTP, has not exactly one message, or is
                too large.
            DeadlineExceeded: it arrived too slowly.
            Unimplemented: its compression is unknown.
        """
        request = self._exchange.request
        check_arrived(request)
        if request.too_large:
            raise too_large("the message has")
        body = request.body
        if len(body) < PREFIX.size:
            raise InvalidArgument("the call has no message", reason="INVALID_FIELD")
        compressed, length = PREFIX.unpack_from(body)
        if len(body) != PREFIX.size + length:
            raise InvalidArgument("the call must have exactly one message", reason="INVALID_FIELD")
        message = body[PREFIX.size :]
        return self._decompressed(message) if compressed else message

    def _decompressed(self, message: bytes) -> bytes:
        encoding = self._exchange.request.headers.get("grpc-encoding", "identity")
        if encoding not in _WINDOW_BITS:
            raise Unimplemented(
                f"unknown message encoding {encoding}; use one of {_ENCODINGS}",
                reason="INVALID_FIELD",
            )
        unpacking = zlib.decompressobj(_WINDOW_BITS[encoding])
        try:
            unpacked = unpacking.decompress(message, MAX_REQUEST_BYTES + 1)
        except zlib.error as error:
            raise InvalidArgument(
                f"the message is not valid {encoding}", reason="INVALID_FIELD"
            ) from error
        if len(unpacked) > MAX_REQUEST_BYTES:
            raise too_large("decompressed, the message has")
        if not unpacking.eof:
            raise InvalidArgument(f"the message is incomplete {encoding}", reason="INVALID_FIELD")
        return unpacked

    # What `serve_call` needs.

    @property
    def identity(self) -> Identity:
        """The caller.

        Raises:
            Unauthenticated: the headers name none.
        """
        return identity_in(self._exchange.request.headers)

    async def work(self) -> None:
        """Reads the request and calls the servicer's method."""
        await self._handler.handle(self.message(), self)

    def trace_headers(self) -> Mapping[str, str]:
        """Returns the headers."""
        return self._exchange.request.headers

    def start_deadline(self) -> Deadline | None:
        """Returns the caller's deadline.

        Raises:
            InvalidArgument: `grpc-timeout` cannot be read.
        """
        seconds = grpc_timeout.timeout_seconds(self._exchange.request.headers)
        if seconds is None:
            return None
        self._deadline_seconds = self._handler.clock.monotonic_seconds() + seconds
        return self._handler.deadlines.after(seconds)

    def end_of(self, raised: Exception) -> str | None:
        """Returns `CANCELLED` if the client closed the connection."""
        closed = isinstance(raised, ConnectionError) and self._exchange.is_closed
        return "CANCELLED" if closed else None

    async def fail(self, error: HeadraceError, *, expected: bool) -> None:  # noqa: ARG002  # a status says it, expected or not
        """Sends the status of an error."""
        await self._end(_error_trailers(error))

    async def succeed(self) -> None:
        """Sends the status `OK`."""
        await self._end({"grpc-status": "0"})

    async def _end(self, trailers: dict[str, str]) -> None:
        """Sends the status behind what was written before, and waits until it is sent."""
        exchange = self._exchange
        if exchange.status is None:  # nothing was written: the status is in the headers
            trailers["grpc-accept-encoding"] = _ENCODINGS
            exchange.respond(b"", content_type=_CONTENT_TYPE, headers=trailers)
            return
        exchange.end(header_lines(trailers).encode())
        try:
            async with asyncio.timeout(ENDING_SECONDS):
                await exchange.drain()
        except TimeoutError:
            exchange.abort()


def _error_trailers(error: HeadraceError) -> dict[str, str]:
    status = to_status(error)
    details = base64.b64encode(status.SerializeToString()).rstrip(b"=").decode()
    return {
        "grpc-status": str(status.code),
        # gRPC percent-encodes what is not printable. Spaces are encoded, too: HTTP/1.1 drops those
        # at the ends, and clients compare the message with the one in the details.
        "grpc-message": quote(status.message, safe="!\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"),
        DETAILS_KEY: details,
    }
