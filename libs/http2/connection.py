"""One HTTP/2 connection of a client: many streams, read as they arrive, in one go.

All messages that one read of the socket brings are handed on before anything else runs, so that
under load a reader wakes once for many of them. There is no push, no priority, and no trailer of a
request.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable
from typing import Protocol, cast

import hpack
from typing_extensions import override

from libs.http2 import frames
from libs.http2.frames import ErrorCode, Frame, FrameType, ProtocolViolationError, Setting
from libs.http2.outbox import Outbox

# All streams together may send so much before this process has read it. It always reads: what holds
# a single stream back is its own window.
CONNECTION_WINDOW_BYTES = 16 * 1024 * 1024
MAX_HEADER_BYTES = 64 * 1024
# A peer whose kernel acknowledges nothing for so long is gone: ours ends the connection, also where
# a stream only waits. It asks after so many seconds of silence, and again.
UNACKNOWLEDGED_SECONDS = 10
KEEPALIVE_SECONDS = 10
KEEPALIVE_AGAIN_SECONDS = 5
# A peer that was silent for so long is asked whether it lives, together with the next request.
IDLE_SECONDS = 10.0
PONG_SECONDS = 5.0

Headers = list[tuple[str, str]]


class Receiver(Protocol):
    """Takes what comes on one stream."""

    def headers_received(self, headers: Headers) -> None:
        """The headers of the answer came, or its trailers."""

    def data_received(self, data: bytes) -> None:
        """A part of the body came. `Stream.consumed` makes room for more."""

    def ended(self, error: str | None) -> None:
        """Nothing else will come. None: the peer ended the stream in order."""


class Stream:
    """One request and its answer.

    Attributes:
        id: of the stream, on its connection.
        open: whether more can come.
    """

    __slots__ = ("_connection", "_consumed", "id", "open", "outgoing", "receiver")

    def __init__(
        self, connection: Connection, stream_id: int, receiver: Receiver, body: bytes
    ) -> None:
        self.id = stream_id
        self.open = True
        self.receiver = receiver
        self.outgoing = connection.outbox.send(stream_id, body)
        self._connection = connection
        self._consumed = 0

    def consumed(self, size: int) -> None:
        """Lets the peer send so many bytes more."""
        self._consumed += size
        if self.open and 2 * self._consumed >= frames.DEFAULT_WINDOW_BYTES:
            self._connection.write(frames.window_update(self.id, self._consumed))
            self._consumed = 0

    def cancel(self) -> None:
        """Ends the stream, if it is open; its receiver is not told."""
        if self.open:
            self._connection.write(frames.rst_stream(self.id, ErrorCode.CANCEL))
            self._connection.forget(self)


class Connection(asyncio.Protocol):
    """A connection.

    Attributes:
        outbox: what waits to be sent.
        failed: why it ended, or goes to end.
        greeted: done when the peer has spoken, or the connection is lost. One that accepts and says
            nothing may be about to stop.
    """

    def __init__(self, *, on_lost: Callable[[Connection], None]) -> None:
        """Makes a connection; `on_lost` hears of it when it is closed."""
        self.outbox = Outbox(self.write)
        self.failed = ""
        self.greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reader = frames.FrameReader()
        self._decoder = hpack.Decoder(max_header_list_size=MAX_HEADER_BYTES)
        self._streams: dict[int, Stream] = {}
        self._next_id = 1
        self._max_streams = frames.MAX_STREAM_ID
        self._received = 0
        self._gathered: list[bytes] | None = None
        self._block: tuple[Frame, bytearray] | None = None
        self._heard_seconds = self._loop.time()
        self._pong: asyncio.TimerHandle | None = None
        self._takers: dict[int, Callable[[Frame], None]] = {
            FrameType.DATA: self._take_data,
            FrameType.HEADERS: self._take_headers,
            FrameType.RST_STREAM: self._take_rst_stream,
            FrameType.SETTINGS: self._take_settings,
            FrameType.PUSH_PROMISE: self._take_push_promise,
            FrameType.PING: self._take_ping,
            FrameType.GOAWAY: self._take_goaway,
            FrameType.WINDOW_UPDATE: self._take_window_update,
            FrameType.CONTINUATION: self._take_continuation,
        }

    @property
    def usable(self) -> bool:
        """Whether another stream may be opened now."""
        return not self.failed and len(self._streams) < self._max_streams

    def open(self, header_block: bytes, body: bytes, receiver: Receiver) -> Stream:
        """Sends a request on a connection that is `usable`.

        Args:
            header_block: encoded, of fields that enter no table.
            body: what the peer has no room for now is sent later.
            receiver: takes the answer.
        """
        stream_id, self._next_id = self._next_id, self._next_id + 2
        self._gathered = [self._ask_if_alive(), frames.headers(stream_id, header_block)]
        stream = self._streams[stream_id] = Stream(self, stream_id, receiver, body)
        gathered, self._gathered = self._gathered, None
        self.write(b"".join(gathered))  # one write: the peer wakes once
        if self._next_id > frames.MAX_STREAM_ID:
            self._leave("it has no numbers left for streams")
        return stream

    def write(self, data: bytes) -> None:
        """Sends frames."""
        if self._gathered is not None:
            self._gathered.append(data)
        elif self._transport is not None:
            self._transport.write(data)

    def forget(self, stream: Stream) -> None:
        """Hands nothing on any more of what comes for a stream."""
        stream.open = False
        stream.outgoing.drop()
        self._streams.pop(stream.id, None)
        self._close_if_done()

    def close(self) -> None:
        """Ends all streams and the connection."""
        self._end("the connection was closed", ErrorCode.NO_ERROR)

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        _watch_peer(transport.get_extra_info("socket"))
        more = CONNECTION_WINDOW_BYTES - frames.DEFAULT_WINDOW_BYTES
        greeting = frames.settings({Setting.ENABLE_PUSH: 0}) + frames.window_update(0, more)
        self.write(frames.PREFACE + greeting)

    @override
    def data_received(self, data: bytes) -> None:
        self._heard_seconds = self._loop.time()
        try:
            for frame in self._reader.feed(data):
                if self._block is not None and frame.type != FrameType.CONTINUATION:
                    raise ProtocolViolationError(  # noqa: TRY301  # saves a call for each frame
                        ErrorCode.PROTOCOL_ERROR, "half of the headers"
                    )
                if taker := self._takers.get(frame.type):
                    taker(frame)
        except ProtocolViolationError as error:
            self._end(f"the peer broke HTTP/2: {error}", error.code)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._pong is not None:
            self._pong.cancel()
        self._leave(f"the connection was lost: {exc}" if exc else "the peer closed the connection")
        self._on_lost(self)
        self._greet()
        self._fail(list(self._streams.values()), self.failed)

    def _take_data(self, frame: Frame) -> None:
        size = len(frame.payload)
        self._received += size
        if 2 * self._received >= CONNECTION_WINDOW_BYTES:
            self.write(frames.window_update(0, self._received))
            self._received = 0
        stream = self._streams.get(frame.stream_id)
        if stream is None:  # it was cancelled
            return
        data = frames.content(frame)
        if size > len(data):
            stream.consumed(size - len(data))
        stream.receiver.data_received(data)
        if frame.flags & frames.END_STREAM:
            self._finish(stream)

    def _take_headers(self, frame: Frame) -> None:
        self._block = (frame, bytearray(frames.content(frame)))
        self._take_block_if_whole(frame.flags)

    def _take_continuation(self, frame: Frame) -> None:
        if self._block is None or frame.stream_id != self._block[0].stream_id:
            raise ProtocolViolationError(ErrorCode.PROTOCOL_ERROR, "the rest of no headers")
        self._block[1].extend(frame.payload)
        self._take_block_if_whole(frame.flags)

    def _take_block_if_whole(self, flags: int) -> None:
        assert self._block is not None  # noqa: S101  # the callers have set it
        first, block = self._block
        if len(block) > MAX_HEADER_BYTES:
            raise ProtocolViolationError(ErrorCode.ENHANCE_YOUR_CALM, "headers without bounds")
        if not flags & frames.END_HEADERS:
            return
        self._block = None
        try:  # also of a stream that was cancelled: later headers refer to these
            headers = cast(Headers, self._decoder.decode(bytes(block)))
        except (hpack.HPACKError, UnicodeDecodeError) as error:
            raise ProtocolViolationError(ErrorCode.COMPRESSION_ERROR, repr(error)) from error
        stream = self._streams.get(first.stream_id)
        if stream is None:
            return
        stream.receiver.headers_received(headers)
        if first.flags & frames.END_STREAM:
            self._finish(stream)

    def _take_rst_stream(self, frame: Frame) -> None:
        code = frames.error_name(frames.number(frame.payload))
        if stream := self._streams.get(frame.stream_id):
            self._fail([stream], f"the peer reset the stream: {code}")

    def _take_settings(self, frame: Frame) -> None:
        if frame.flags & frames.ACK:
            return
        for key, value in frames.read_settings(frame.payload):
            if key == Setting.MAX_CONCURRENT_STREAMS:
                self._max_streams = value
            elif key == Setting.MAX_FRAME_SIZE:
                self.outbox.max_frame_bytes = max(value, frames.MAX_FRAME_BYTES)
            elif key == Setting.INITIAL_WINDOW_SIZE:
                self.outbox.set_stream_window(value)
        self.write(frames.frame(FrameType.SETTINGS, frames.ACK, 0))
        self._greet()

    def _take_push_promise(self, _frame: Frame) -> None:
        raise ProtocolViolationError(ErrorCode.PROTOCOL_ERROR, "a push, though it was refused")

    def _take_ping(self, frame: Frame) -> None:
        if not frame.flags & frames.ACK:
            self.write(frames.frame(FrameType.PING, frames.ACK, 0, frame.payload))

    def _take_goaway(self, frame: Frame) -> None:
        last = frames.number(frame.payload)
        self._leave(f"the peer goes away: {frames.error_name(frames.number(frame.payload, 4))}")
        self._fail([one for key, one in self._streams.items() if key > last], self.failed)
        self._close_if_done()

    def _take_window_update(self, frame: Frame) -> None:
        size = frames.number(frame.payload)
        if not frame.stream_id:
            self.outbox.grant(None, size)
        elif stream := self._streams.get(frame.stream_id):
            self.outbox.grant(stream.outgoing, size)

    def _ask_if_alive(self) -> bytes:
        """Returns a PING if the peer was silent for long: a host that is gone tells nobody."""
        if self._pong is not None or self._loop.time() < self._heard_seconds + IDLE_SECONDS:
            return b""
        self._pong = self._loop.call_later(PONG_SECONDS, self._look_for_pong, self._heard_seconds)
        return frames.frame(FrameType.PING, 0, 0, bytes(8))

    def _look_for_pong(self, heard_seconds: float) -> None:
        self._pong = None
        if self._heard_seconds == heard_seconds and self._transport is not None:
            self._leave(f"the peer was silent for {PONG_SECONDS:g} s")
            self._transport.abort()

    def _finish(self, stream: Stream) -> None:
        """Ends a stream that the peer ended, also where it did not wait for the whole request."""
        if stream.open:
            if stream.outgoing.left:
                self.write(frames.rst_stream(stream.id, ErrorCode.CANCEL))
            self._fail([stream], None)

    def _greet(self) -> None:
        if not self.greeted.done():
            self.greeted.set_result(None)

    def _fail(self, streams: Iterable[Stream], error: str | None) -> None:
        for stream in streams:
            self.forget(stream)
            stream.receiver.ended(error)

    def _close_if_done(self) -> None:
        if self.failed and not self._streams and self._transport is not None:
            self._transport.close()

    def _leave(self, why: str) -> None:
        """Takes no more streams; those that run go on."""
        if not self.failed:
            self.failed = why

    def _end(self, why: str, code: ErrorCode) -> None:
        self._leave(why)
        self.write(frames.goaway(code))
        self._fail(list(self._streams.values()), why)
        self._close_if_done()


def _watch_peer(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS),
        (socket.TCP_KEEPINTVL, KEEPALIVE_AGAIN_SECONDS),
        (socket.TCP_USER_TIMEOUT, 1000 * UNACKNOWLEDGED_SECONDS),
    ):
        peer.setsockopt(socket.IPPROTO_TCP, option, value)
