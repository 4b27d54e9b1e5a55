"""One connection without a socket: any bytes from the peer, and any order of its windows."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

from h2.settings import SettingCodes
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import override

from libs.grpc_stream.call import ServerStreamCall
from libs.grpc_stream.connection import Connection, Headers, Receiver, Stream
from tests.support import http2_frames as frames
from tests.support.http2_frames import Frame

WINDOW = 65_535
HEADERS: Headers = [(b":method", b"POST"), (b":path", b"/test.Raw/Stream")]


class Wire(asyncio.Transport):
    """A transport that keeps what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.closed = False
        self._socket = socket.socket()

    @override
    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._socket

    @override
    def write(self, data: Any) -> None:
        self.sent += data

    @override
    def is_closing(self) -> bool:
        return self.closed

    @override
    def close(self) -> None:
        self.closed = True
        self._socket.close()

    def frames(self) -> list[Frame]:
        """Returns all frames after the preface."""
        at, found = len(frames.PREFACE), list[Frame]()
        while at < len(self.sent):
            length = int.from_bytes(self.sent[at : at + 3], "big")
            head, at = self.sent[at : at + 9], at + 9
            payload, at = self.sent[at : at + length], at + length
            found.append(Frame(head[3], head[4], int.from_bytes(head[5:9], "big"), payload))
        return found

    def body(self, stream_id: int) -> tuple[bytes, int]:
        """Returns what was sent of a request, and how often it ended."""
        parts = [one for one in self.frames() if (one.type, one.stream_id) == (0, stream_id)]
        return b"".join(part.payload for part in parts), sum(part.flags & 1 for part in parts)


class Silent(Receiver):
    """Ignores the response."""

    @override
    def headers_received(self, headers: Headers, *, end_stream: bool) -> None: ...

    @override
    def data_received(self, data: bytes) -> None: ...

    @override
    def ended(self, error: str | None) -> None: ...


def connected(work: Callable[[Connection, Wire], None]) -> None:
    """Runs something with a connection that was greeted."""

    async def run() -> None:
        connection, wire = Connection(on_lost=lambda _: None), Wire()
        connection.connection_made(wire)
        connection.data_received(frames.settings({}))
        try:
            work(connection, wire)
        finally:
            connection.connection_lost(None)
            wire.close()

    asyncio.run(run())


# Mostly frames that make sense somewhere, for the streams that there are.
SMALL = st.integers(0, 7)
FRAME = st.builds(
    frames.frame,
    st.integers(0, 12),
    st.sampled_from([0, 1, 4, 5, 8, 0x20, 0x2D, 0xFF]),
    SMALL,
    st.one_of(
        st.binary(max_size=40),
        st.sampled_from([b"\x88", bytes(4), bytes(8), b"\x00\x00\x00\x00\x01x", b"\x00\x04" * 3]),
    ),
)


@given(st.lists(FRAME | st.binary(max_size=30), max_size=12), st.lists(st.floats(0, 1), max_size=6))
@settings(max_examples=300)
def test_whatever_a_peer_sends_is_survived(parts, cuts):
    """Calls end with a status or continue; nothing else is raised, and an end is final."""
    data = b"".join(parts)
    at = [0, *sorted(int(cut * len(data)) for cut in cuts), len(data)]

    def feed(connection: Connection, wire: Wire) -> None:
        calls = [ServerStreamCall() for _ in range(3)]
        for call in calls:
            call.start(connection, HEADERS, bytes(100_000))
        for start, end in pairwise(at):
            if not wire.closed:
                connection.data_received(data[start:end])
        assert wire.closed <= all(call._ended for call in calls)
        connection.connection_lost(None)
        assert all(call._ended for call in calls)

    connected(feed)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("open"), st.integers(0, 90_000)),
        st.tuples(st.just("grant"), st.integers(0, 4), st.integers(1, 40_000)),
        st.tuples(st.just("grant all"), st.integers(1, 60_000)),
        st.tuples(st.just("initial"), st.integers(0, 70_000)),
        st.tuples(st.just("cancel"), st.integers(0, 4)),
    ),
    max_size=25,
)


class Bodies:
    """What RFC 9113, 5.2 lets a client send, beside a connection that sends it."""

    def __init__(self, connection: Connection, wire: Wire) -> None:
        self.connection, self.wire = connection, wire
        self.window = self.initial = WINDOW
        self.windows: dict[int, int] = {}
        self.streams: dict[int, tuple[Stream, bytes]] = {}

    def step(self, kind: str, *arguments: int) -> None:
        if kind == "open":
            body = bytes(index % 251 for index in range(arguments[0]))
            stream = self.connection.open(HEADERS, body, Silent())
            self.streams[stream.id] = (stream, body)
            self.windows[stream.id] = self.initial
        elif kind == "grant all":
            self.window += arguments[0]
            self.connection.data_received(frames.window_update(0, arguments[0]))
        elif kind == "initial":
            self.windows = {
                key: window + arguments[0] - self.initial for key, window in self.windows.items()
            }
            self.initial = arguments[0]
            pairs = {SettingCodes.INITIAL_WINDOW_SIZE: arguments[0]}
            self.connection.data_received(frames.settings(pairs))
        elif (stream_id := 2 * arguments[0] + 1) in self.streams:
            if kind == "grant":
                self.windows[stream_id] += arguments[1]
                self.connection.data_received(frames.window_update(stream_id, arguments[1]))
            else:
                self.streams[stream_id][0].cancel()

    def check(self) -> None:
        bodies = {key: self.wire.body(key) for key in self.streams}
        room = self.window - sum(len(sent) for sent, _ in bodies.values())
        assert room >= 0
        for key, (stream, body) in self.streams.items():
            sent, ends = bodies[key]
            assert body.startswith(sent)
            assert ends == (sent == body and (ends or stream.open))
            waits = stream.open and sent != body
            assert not (waits and room > 0 and self.windows[key] > len(sent))


@given(STEPS)
@settings(deadline=None)
def test_requests_use_the_windows_and_never_more(steps):
    """Each body is sent in order and ends once, whatever the order of the peer's windows."""

    def run(connection: Connection, wire: Wire) -> None:
        bodies = Bodies(connection, wire)
        before: dict[int, int] = {}
        for step in cast(list[tuple[str, int]], steps):
            bodies.step(*step)
            bodies.check()
            for key, size in before.items():  # what has no room does not grow
                sent = len(wire.body(key)[0])
                assert sent in (size, min(sent, max(size, bodies.windows[key])))
            before = {key: len(wire.body(key)[0]) for key in bodies.streams}
        bodies.step("grant all", 3_000_000)
        for index in range(len(bodies.streams)):
            bodies.step("grant", index, 300_000)
        bodies.check()
        for key, (stream, body) in bodies.streams.items():
            assert wire.body(key) == (body, 1) or not stream.open

    connected(run)
