"""One call: the messages and the status in a response stream."""

from __future__ import annotations

import asyncio
from urllib.parse import unquote

import grpc
from typing_extensions import override

from libs.grpc_stream.connection import Connection, Headers, Receiver, Stream
from libs.rpc.channel import MAX_MESSAGE_BYTES
from libs.rpc.framing import PREFIX, framed

# A reader may take 0.1 ms for each, during which no other task runs.
MAX_MESSAGES_AT_ONCE = 256

_CODES = {str(code.value[0]).encode(): code for code in grpc.StatusCode}


class ServerStreamError(Exception):
    """A call ended with another status than OK.

    Attributes:
        code: the call's status; UNAVAILABLE where the connection ended or the response was invalid.
    """

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code


class ServerStreamCall(Receiver):
    """A running call. Messages that are not read hold the peer back, by the stream's window."""

    def __init__(self) -> None:
        self._stream: Stream | None = None
        self._messages: list[bytes] = []
        self._has_more = False  # the last `read` left messages
        self._partial = bytearray()  # the start of a message
        self._needed = 0  # bytes that `_partial` must have at least to be worth parsing
        self._unacknowledged = 0  # bytes received for which the window was not reopened yet
        self._http_status = b""
        self._trailers: dict[bytes, bytes] = {}
        self._ended = False
        self._error: ServerStreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def start(self, connection: Connection, headers: Headers, message: bytes) -> None:
        """Sends the request."""
        self._stream = connection.open(headers, framed(message), self)

    def expire_at(self, loop_seconds: float) -> None:
        """Ends the call with DEADLINE_EXCEEDED at this time of the event loop."""
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_at(loop_seconds, self._expire)

    async def read(self) -> list[bytes]:
        """Returns messages that have arrived; waits for the first. None left: the call is over.

        Others run before the next ones are returned, where many have arrived: a window has room for
        13,000 empty messages.

        Raises:
            ServerStreamError: the call ended with another status than OK, and all its messages
                were read.
        """
        if self._has_more:
            await asyncio.sleep(0)
        while not self._messages:
            if self._error is not None:
                raise self._error
            if self._ended:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        messages, self._messages = self._messages, []
        self._has_more = len(messages) > MAX_MESSAGES_AT_ONCE
        if self._has_more:
            self._messages = messages[MAX_MESSAGES_AT_ONCE:]
            return messages[:MAX_MESSAGES_AT_ONCE]
        self._make_room()
        return messages

    def close(self) -> None:
        """Cancels the call if it runs; a waiting `read` raises CANCELLED."""
        self._cancel(ServerStreamError(grpc.StatusCode.CANCELLED, "the call was closed"))

    @override
    def headers_received(self, headers: Headers, *, end_stream: bool) -> None:
        fields = dict(headers)
        self._http_status = fields.get(b":status", self._http_status)
        if end_stream:  # only what ends the stream carries the status
            self._trailers = fields

    @override
    def data_received(self, data: bytes) -> None:
        self._unacknowledged += len(data)
        if self._partial:
            self._partial += data
            data = bytes(self._partial) if len(self._partial) >= self._needed else b""
        if data:
            try:
                self._partial = bytearray(self._parse(data))
            except ServerStreamError as error:
                self._cancel(error)
                return
        if self._messages:
            self._wake()
        else:  # a message may be larger than the window, and arrives in parts
            self._make_room()

    @override
    def ended(self, error: str | None) -> None:
        if error is not None:
            self._end(ServerStreamError(grpc.StatusCode.UNAVAILABLE, error))
        else:
            status = _error_of(self._http_status, self._trailers)
            if status is None and self._partial:
                status = ServerStreamError(grpc.StatusCode.INTERNAL, "the last message is cut off")
            self._end(status)

    def _parse(self, data: bytes) -> bytes:
        """Appends the complete messages; returns the rest."""
        at = self._needed = 0
        while len(data) - at >= PREFIX.size:
            compressed, length = PREFIX.unpack_from(data, at)
            if compressed:
                raise ServerStreamError(grpc.StatusCode.INTERNAL, "a message is compressed")
            if length > MAX_MESSAGE_BYTES:
                raise ServerStreamError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"a message has {length} bytes; the limit is {MAX_MESSAGE_BYTES}",
                )
            end = at + PREFIX.size + length
            if end > len(data):
                self._needed = end - at
                break
            self._messages.append(data[at + PREFIX.size : end])
            at = end
        return data[at:]

    def _make_room(self) -> None:
        if self._stream is not None:
            self._stream.consumed(self._unacknowledged)
        self._unacknowledged = 0

    def _expire(self) -> None:
        self._cancel(ServerStreamError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed"))

    def _cancel(self, error: ServerStreamError) -> None:
        if self._stream is not None:
            self._stream.cancel()
        if not self._ended:
            self._end(error)

    def _end(self, error: ServerStreamError | None) -> None:
        self._ended = True
        self._error = error
        if self._deadline is not None:
            self._deadline.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _error_of(http_status: bytes, trailers: dict[bytes, bytes]) -> ServerStreamError | None:
    """Returns the error of a response that ended normally. None: its status is OK."""
    status = trailers.get(b"grpc-status")
    if status is None:
        return ServerStreamError(
            grpc.StatusCode.UNAVAILABLE,
            f"the response has no gRPC status: HTTP {http_status.decode(errors='replace')}",
        )
    code = _CODES.get(status, grpc.StatusCode.UNKNOWN)
    if code is grpc.StatusCode.OK:
        return None
    return ServerStreamError(code, unquote(trailers.get(b"grpc-message", b"").decode("latin-1")))
