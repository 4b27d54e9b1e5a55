"""One HTTP/2 connection of a client, which carries many streams."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast

from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    RemoteSettingsChanged,
    RequestReceived,
    ResponseReceived,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from typing_extensions import override

from libs.grpc_stream.protocol import MAX_HEADER_LIST_BYTES, ClientProtocol

# All streams together may receive this much ahead of the reader. The connection's window is renewed
# immediately: a single stream is limited by its own window.
CONNECTION_WINDOW_BYTES = 16 * 1024 * 1024
# Of requests, at most so much is copied before it is written: however large the peer's windows are,
# what the kernel does not take stays in the requests.
MAX_UNFLUSHED_BYTES = 262_144
STREAM_WINDOW_BYTES = 65_535  # the initial window of RFC 9113
# The kernel closes the connection when the peer's kernel does not acknowledge for this long, also
# while a stream only waits: it probes after KEEPALIVE_SECONDS of silence, and then repeatedly.
UNACKNOWLEDGED_SECONDS = 10
KEEPALIVE_SECONDS = 10
KEEPALIVE_AGAIN_SECONDS = 5
# After this much silence the next request is sent together with a PING.
SILENCE_SECONDS = 10.0
PONG_SECONDS = 5.0

_HEADER_OVERHEAD_BYTES = 32  # of each field, as SETTINGS_MAX_HEADER_LIST_SIZE counts it
_SETTINGS_FRAME = 0x4
_FRAME_TYPE_OFFSET = 3

Headers = list[tuple[bytes, bytes]]


class Receiver(Protocol):
    """Receives what arrives on one stream."""

    def headers_received(self, headers: Headers, *, end_stream: bool) -> None:
        """Called for the response headers, and for the trailers, which end the stream."""

    def data_received(self, data: bytes) -> None:
        """Called for each part of the body. `Stream.consumed` makes room for more."""

    def ended(self, error: str | None) -> None:
        """Called when nothing more will arrive. None: the peer ended the stream normally."""


class Stream:
    """One request and its response.

    Attributes:
        id: the stream's id on its connection.
        open: whether more can arrive.
        unsent: the part of the request body for which the peer has no room yet.
    """

    __slots__ = ("_connection", "_consumed", "id", "open", "receiver", "unsent")

    def __init__(
        self, connection: Connection, stream_id: int, receiver: Receiver, body: bytes
    ) -> None:
        self.id = stream_id
        self.open = True
        self.receiver = receiver
        self.unsent = memoryview(body)
        self._connection = connection
        self._consumed = 0

    def consumed(self, size: int) -> None:
        """Lets the peer send `size` bytes more."""
        self._consumed += size
        if self.open and 2 * self._consumed >= STREAM_WINDOW_BYTES:
            size, self._consumed = self._consumed, 0
            self._connection.make_room(self, size)

    def cancel(self) -> None:
        """Resets the stream if it is open, without a call of `Receiver.ended`."""
        if self.open:
            self._connection.reset(self)


class Connection(asyncio.Protocol):
    """A connection.

    Attributes:
        failed: why the connection takes no more streams; empty while it does.
        greeted: done when the peer's SETTINGS arrived or the connection was lost. A peer that
            accepts a connection and sends nothing may be about to stop.
        idle_since_seconds: the loop's time since when the connection has no streams.
    """

    def __init__(self, *, on_lost: Callable[[Connection], None]) -> None:
        """Makes a connection; `on_lost` is called when it is closed."""
        self._loop = asyncio.get_running_loop()
        self.failed = ""
        self.greeted: asyncio.Future[None] = self._loop.create_future()
        self.idle_since_seconds = self._loop.time()
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._protocol = ClientProtocol()
        self._streams: dict[int, Stream] = {}
        # Streams with parts of a request for which the peer, or the kernel, has no room yet.
        self._blocked: dict[int, Stream] = {}
        self._received = 0  # bytes for which the connection's window was not reopened yet
        self._reading = False
        self._paused = False  # the kernel takes no more for now
        self._unflushed_bytes = 0
        self._last_read_seconds = self._loop.time()
        self._pong: asyncio.TimerHandle | None = None
        self._handlers: dict[type, Callable[[Any], None]] = {
            DataReceived: self._data_arrived,
            ResponseReceived: self._headers_arrived,
            TrailersReceived: self._headers_arrived,
            RequestReceived: self._request_arrived,
            StreamReset: self._stream_was_reset,
            RemoteSettingsChanged: self._settings_arrived,
            WindowUpdated: self._window_opened,
            ConnectionTerminated: self._goaway_arrived,
        }

    @property
    def usable(self) -> bool:
        """Whether another stream can be opened now."""
        limit = self._protocol.remote_settings.max_concurrent_streams
        return not self.failed and len(self._streams) < limit

    @property
    def idle(self) -> bool:
        """Whether the connection has no streams."""
        return not self._streams

    def open(self, headers: Headers, body: bytes, receiver: Receiver) -> Stream:
        """Sends a request on a connection that is `usable`, in one write.

        Args:
            headers: the request headers; names in lower case, pseudo-headers first.
            body: the request body; what the peer has no room for now is sent later.
            receiver: receives the response.
        """
        self._ping_after_silence()
        stream_id = self._protocol.get_next_available_stream_id()
        self._protocol.send_headers(stream_id, headers)
        stream = self._streams[stream_id] = Stream(self, stream_id, receiver, body)
        self._send_body(stream)
        self._flush()
        if stream_id + 2 > self._protocol.HIGHEST_ALLOWED_STREAM_ID:
            self._retire("the connection has used all stream ids")
        return stream

    def make_room(self, stream: Stream, size: int) -> None:
        """Opens the receive window of an open stream by `size` bytes."""
        if self._protocol.is_open(stream.id):
            self._protocol.increment_flow_control_window(size, stream.id)
            self._flush()

    def reset(self, stream: Stream) -> None:
        """Cancels an open stream."""
        self._cancel(stream)
        self._forget(stream)
        self._flush()

    def close(self) -> None:
        """Ends all streams and the connection."""
        self._end("the connection was closed")

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        _enable_keepalive(transport.get_extra_info("socket"))
        self._protocol.initiate_connection()
        more = CONNECTION_WINDOW_BYTES - STREAM_WINDOW_BYTES
        self._protocol.increment_flow_control_window(more)
        self._flush()

    @override
    def data_received(self, data: bytes) -> None:
        self._last_read_seconds = self._loop.time()
        if not self.greeted.done() and _is_not_http2(data):
            self._end("the peer does not speak HTTP/2", ErrorCodes.PROTOCOL_ERROR)
            return
        self._reading = True  # what the handlers send leaves in one write
        try:
            for event in self._protocol.receive_data(data):
                if handler := self._handlers.get(type(event)):
                    handler(event)
        except ProtocolError as error:
            self._end(f"the peer violated HTTP/2: {error}", error.error_code)
        finally:
            self._reading = False
        self._flush()

    @override
    def pause_writing(self) -> None:
        self._paused = True

    @override
    def resume_writing(self) -> None:
        self._paused = False
        self._send_blocked()
        self._flush()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._pong is not None:
            self._pong.cancel()
        self._retire(f"the connection was lost: {exc}" if exc else "the peer closed the connection")
        self._on_lost(self)
        self._set_greeted()
        self._fail(list(self._streams.values()), self.failed)

    def _data_arrived(self, event: DataReceived) -> None:
        size = event.flow_controlled_length
        self._received += size
        if 2 * self._received >= CONNECTION_WINDOW_BYTES:
            self._protocol.increment_flow_control_window(self._received)
            self._received = 0
        stream = self._streams.get(event.stream_id)
        if stream is None:  # cancelled by an earlier event of the same read
            return
        data = event.data
        if size > len(data):  # padding
            stream.consumed(size - len(data))
        stream.receiver.data_received(data)
        if event.stream_ended is not None:
            self._finish(stream)

    def _headers_arrived(self, event: ResponseReceived | TrailersReceived) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is None:
            return
        headers = event.headers
        end_stream = event.stream_ended is not None
        size = sum(len(name) + len(value) + _HEADER_OVERHEAD_BYTES for name, value in headers)
        if size > MAX_HEADER_LIST_BYTES:
            self._cancel(stream)
            why = f"the peer sent headers of {size} bytes; the limit is {MAX_HEADER_LIST_BYTES}"
            self._fail([stream], why)
            return
        stream.receiver.headers_received(headers, end_stream=end_stream)
        if end_stream:
            self._finish(stream)

    def _request_arrived(self, _event: RequestReceived) -> None:
        raise ProtocolError("a server sent a request")

    def _stream_was_reset(self, event: StreamReset) -> None:
        """Also for a reset by `h2` itself, which found a fault of the peer in this stream."""
        if stream := self._streams.get(event.stream_id):
            who = "the peer reset the stream" if event.remote_reset else "the peer violated HTTP/2"
            self._fail([stream], f"{who}: {_name(event.error_code)}")

    def _settings_arrived(self, _event: RemoteSettingsChanged) -> None:
        self._send_blocked()
        self._set_greeted()

    def _window_opened(self, _event: WindowUpdated) -> None:
        self._send_blocked()

    def _goaway_arrived(self, event: ConnectionTerminated) -> None:
        last = event.last_stream_id or 0
        self._retire(f"the peer is shutting down: {_name(event.error_code)}")
        self._fail([one for key, one in self._streams.items() if key > last], self.failed)
        self._close_if_done()

    def _send_blocked(self) -> None:
        for stream in list(self._blocked.values()):
            if self._protocol.is_open(stream.id):
                self._send_body(stream)

    def _send_body(self, stream: Stream) -> None:
        """Sends as much of a request as the peer's windows allow."""
        ended = False
        while not ended:
            if self._paused or self._unflushed_bytes >= MAX_UNFLUSHED_BYTES:
                self._blocked[stream.id] = stream
                return
            size = min(
                len(stream.unsent),
                self._protocol.max_outbound_frame_size,
                self._protocol.local_flow_control_window(stream.id),
            )
            if stream.unsent and size <= 0:
                self._blocked[stream.id] = stream
                return
            part, stream.unsent = stream.unsent[:size], stream.unsent[size:]
            ended = not stream.unsent
            self._protocol.send_data(stream.id, part, end_stream=ended)
            self._unflushed_bytes += size
        self._blocked.pop(stream.id, None)

    def _ping_after_silence(self) -> None:
        """Asks a peer that was silent whether it still runs: a lost host sends no sign."""
        if self._pong is None and self._loop.time() >= self._last_read_seconds + SILENCE_SECONDS:
            self._pong = self._loop.call_later(
                PONG_SECONDS, self._check_pong, self._last_read_seconds
            )
            self._protocol.ping(bytes(8))

    def _check_pong(self, last_read_seconds: float) -> None:
        self._pong = None
        if self._last_read_seconds == last_read_seconds and self._transport is not None:
            self._retire(f"the peer was silent for {PONG_SECONDS:g} s")
            self._transport.abort()

    def _finish(self, stream: Stream) -> None:
        """Ends a stream that the peer ended, also where it did not wait for all of the request."""
        if stream.open:
            self._cancel(stream)
            self._fail([stream], None)

    def _cancel(self, stream: Stream) -> None:
        """Resets a stream, unless both sides have ended it."""
        if self._protocol.is_open(stream.id):
            self._protocol.reset_stream(stream.id, ErrorCodes.CANCEL)

    def _set_greeted(self) -> None:
        if not self.greeted.done():
            self.greeted.set_result(None)

    def _fail(self, streams: Iterable[Stream], error: str | None) -> None:
        for stream in streams:
            self._forget(stream)
            stream.receiver.ended(error)

    def _forget(self, stream: Stream) -> None:
        stream.open = False
        stream.unsent = memoryview(b"")
        self._blocked.pop(stream.id, None)
        self._streams.pop(stream.id, None)
        if not self._streams:
            self.idle_since_seconds = self._loop.time()
        self._close_if_done()

    def _retire(self, why: str) -> None:
        """Takes no more streams; the open ones continue."""
        if not self.failed:
            self.failed = why

    def _end(self, why: str, code: ErrorCodes | int = ErrorCodes.NO_ERROR) -> None:
        self._retire(why)
        if not self._protocol.is_closed:
            self._protocol.close_connection(code)
        self._fail(list(self._streams.values()), why)
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self.failed and not self._streams and self._transport is not None:
            self._transport.write(self._protocol.data_to_send())
            self._transport.close()

    def _flush(self) -> None:
        if self._transport is None or self._reading or self._transport.is_closing():
            return
        while data := self._protocol.data_to_send():
            self._unflushed_bytes = 0
            self._transport.write(data)
            self._send_blocked()


def _is_not_http2(data: bytes) -> bool:
    """Whether the first bytes of a connection cannot be a SETTINGS frame.

    `h2` would take them for the length of a frame, and wait for that many bytes.
    """
    return data[_FRAME_TYPE_OFFSET : _FRAME_TYPE_OFFSET + 1] not in {b"", bytes((_SETTINGS_FRAME,))}


def _name(code: ErrorCodes | int | None) -> str:
    return code.name if isinstance(code, ErrorCodes) else f"code {code}"


def _enable_keepalive(peer: socket.socket) -> None:
    if peer.family == socket.AF_UNIX:  # the kernel closes it with the peer's process
        return
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS),
        (socket.TCP_KEEPINTVL, KEEPALIVE_AGAIN_SECONDS),
        (socket.TCP_USER_TIMEOUT, 1000 * UNACKNOWLEDGED_SECONDS),
    ):
        peer.setsockopt(socket.IPPROTO_TCP, option, value)
