"""Calls of gRPC that send one message and read a stream of them, as bytes and in batches.

For the one path where each message counts: `grpc.aio` carries every message through a completion
queue, a thread and a socket that wakes the loop. Here all messages that one read of the socket
brings come in one `read`.
"""

from __future__ import annotations

import asyncio
import math
from urllib.parse import unquote

import grpc
from typing_extensions import override

from libs.http2 import frames
from libs.http2.connection import Connection, Headers, Receiver, Stream
from libs.rpc.channel import MAX_MESSAGE_BYTES
from libs.rpc.framing import PREFIX, framed

CONNECT_SECONDS = 5.0

_CODES = {str(code.value[0]): code for code in grpc.StatusCode}

Metadata = tuple[tuple[str, str], ...]


class RawCallError(Exception):
    """A call ended with another status than OK.

    Attributes:
        code: its status; UNAVAILABLE where the connection ended.
    """

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code


class RawCall(Receiver):
    """A call that runs. What is not read holds the peer back, by the stream's window."""

    def __init__(self) -> None:
        self._stream: Stream | None = None
        self._messages: list[bytes] = []
        self._part = bytearray()
        self._wanted = 0  # what `_part` must have at least before it is worth a look
        self._held = 0  # bytes that came and make no room yet
        self._headers: dict[str, str] = {}
        self._ended = False
        self._error: RawCallError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def expire_in(self, seconds: float) -> None:
        """Ends the call with DEADLINE_EXCEEDED after so long."""
        self._timer = asyncio.get_running_loop().call_later(max(0.0, seconds), self._expire)

    def start(self, connection: Connection, header_block: bytes, message: bytes) -> None:
        """Sends the request."""
        self._stream = connection.open(header_block, framed(message), self)

    async def read(self) -> list[bytes]:
        """Returns all messages that have come, and waits for the first; none: the call is over.

        Raises:
            RawCallError: it ended with another status than OK, and all its messages were read.
        """
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
        self._make_room()
        return messages

    def close(self) -> None:
        """Ends the call, if it runs; who still reads it is told so."""
        if self._stream is not None:
            self._stream.cancel()
        if not self._ended:
            self._end(RawCallError(grpc.StatusCode.CANCELLED, "the call was closed"))

    @override
    def headers_received(self, headers: Headers) -> None:
        self._headers.update(headers)

    @override
    def data_received(self, data: bytes) -> None:
        self._held += len(data)
        if self._part:
            self._part += data
            data = bytes(self._part) if len(self._part) >= self._wanted else b""
        if data:
            try:
                self._part = bytearray(self._cut(data))
            except RawCallError as error:
                self._end(error)
                self.close()
                return
        if self._messages:
            self._wake()
        else:  # a message may be larger than the window: it comes through it in parts
            self._make_room()

    @override
    def ended(self, error: str | None) -> None:
        if error is not None:
            self._end(RawCallError(grpc.StatusCode.UNAVAILABLE, error))
        else:
            status = _status(self._headers)
            if status is None and self._part:
                status = RawCallError(grpc.StatusCode.INTERNAL, "half a message")
            self._end(status)

    def _cut(self, data: bytes) -> bytes:
        """Takes the messages that are whole; returns what is left."""
        at = self._wanted = 0
        while len(data) - at >= PREFIX.size:
            compressed, length = PREFIX.unpack_from(data, at)
            if compressed:
                raise RawCallError(grpc.StatusCode.INTERNAL, "a compressed message")
            if length > MAX_MESSAGE_BYTES:
                raise RawCallError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED, f"a message of {length} bytes"
                )
            end = at + PREFIX.size + length
            if end > len(data):
                self._wanted = end - at
                break
            self._messages.append(data[at + PREFIX.size : end])
            at = end
        return data[at:]

    def _make_room(self) -> None:
        if self._stream is not None:
            self._stream.consumed(self._held)
        self._held = 0

    def _expire(self) -> None:
        if not self._ended:
            self._end(_deadline_exceeded())
            self.close()

    def _end(self, error: RawCallError | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._ended = True
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class RawClient:
    """Calls of one address. It connects when it is first used, and again whenever it must."""

    def __init__(self, address: str) -> None:
        """Makes a client of a `host:port`."""
        self._address = address
        self._connections: list[Connection] = []
        self._connecting: asyncio.Task[Connection] | None = None
        self._blocks: dict[str, bytes] = {}
        self._closed = False

    async def call(
        self,
        method: str,
        message: bytes,
        metadata: Metadata = (),
        *,
        timeout_seconds: float | None = None,
    ) -> RawCall:
        """Sends a request and returns its call, which the caller closes.

        Args:
            method: `/package.Service/Method`.
            message: serialised.
            metadata: ASCII, with names in lower case.
            timeout_seconds: after so long, connecting included, the call ends with
                DEADLINE_EXCEEDED, here and at the server; None: never.

        Raises:
            RawCallError: UNAVAILABLE, no connection; or DEADLINE_EXCEEDED.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(timeout_seconds):
                connection = await self._connection()
        except TimeoutError as error:
            raise _deadline_exceeded() from error
        block = self._blocks.get(method)
        if block is None:
            block = self._blocks[method] = _request_headers(method, self._address)
        block += b"".join(frames.literal(name, value) for name, value in metadata)
        call = RawCall()
        if timeout_seconds is not None:
            left = timeout_seconds - (loop.time() - started)
            block += frames.literal("grpc-timeout", _grpc_timeout(left))
            call.expire_in(left)
        call.start(connection, block, message)
        return call

    async def close(self) -> None:
        """Ends all calls and connections; there will be no others."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])  # it may have connected all the same
        for connection in list(self._connections):
            connection.close()

    async def _connection(self) -> Connection:
        while not self._closed:
            for connection in self._connections:
                if connection.usable:
                    return connection
            if self._connecting is None:  # one try at a time, whoever waits for it
                self._connecting = asyncio.create_task(self._connect())
                self._connecting.add_done_callback(self._connected)
            connecting = self._connecting
            await asyncio.wait([connecting])  # unlike `shield`, does not cancel who waits with it
            if not connecting.cancelled() and (failed := connecting.result().failed):
                raise self._unavailable(failed)
        raise self._unavailable("the client was closed")

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        host, _, port = self._address.rpartition(":")
        try:
            self._address.encode("ascii")  # it becomes a header
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await loop.create_connection(
                    lambda: Connection(on_lost=self._drop), host.strip("[]"), int(port)
                )
                try:
                    await connection.greeted
                except asyncio.CancelledError:  # by the timeout, or by `close`
                    connection.close()
                    raise
        except (OSError, ValueError, OverflowError) as error:  # too late; or the address is none
            raise self._unavailable(repr(error)) from error
        if not connection.usable:
            why = connection.failed or "it takes no streams"
            connection.close()
            raise self._unavailable(why)
        return connection

    def _unavailable(self, why: str) -> RawCallError:
        return RawCallError(
            grpc.StatusCode.UNAVAILABLE, f"cannot connect to {self._address}: {why}"
        )

    def _connected(self, task: asyncio.Task[Connection]) -> None:
        self._connecting = None
        if not task.cancelled() and task.exception() is None and not task.result().failed:
            self._connections.append(task.result())

    def _drop(self, connection: Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)


def _request_headers(method: str, authority: str) -> bytes:
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": method,
        ":authority": authority,
        "te": "trailers",
        "content-type": "application/grpc",
    }
    return b"".join(frames.literal(name, value) for name, value in fields.items())


def _deadline_exceeded() -> RawCallError:
    return RawCallError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed")


def _grpc_timeout(seconds: float) -> str:
    """Returns a `grpc-timeout`: eight digits at most and a unit, rounded up."""
    for unit, per_second in (("u", 1e6), ("m", 1e3), ("S", 1.0)):
        count = math.ceil(max(0.0, seconds) * per_second)
        if count < 10**8:
            return f"{count}{unit}"
    return "99999999S"


def _status(headers: dict[str, str]) -> RawCallError | None:
    """Returns the error that a whole answer ends with."""
    http_status, status = headers.get(":status"), headers.get("grpc-status")
    if status is None:
        return RawCallError(
            grpc.StatusCode.UNAVAILABLE, f"an answer without gRPC's status: HTTP {http_status}"
        )
    code = _CODES.get(status, grpc.StatusCode.UNKNOWN)
    if code is grpc.StatusCode.OK:
        return None
    return RawCallError(code, unquote(headers.get("grpc-message", "")))
