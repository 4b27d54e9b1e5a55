"""How the connections of token streams start and end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import grpc
import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from libs.grpc_stream import ServerStreamClient, ServerStreamError
from libs.grpc_stream import client as client_module
from libs.grpc_stream import connection as connection_module
from libs.grpc_stream.connection import MAX_UNFLUSHED_BYTES, Connection
from libs.rpc.framing import PREFIX
from tests.support import http2_frames as frames
from tests.support.grpc_stream import METHOD, StreamSetup, all_of, error_of, make_silent, talking
from tests.support.http2_frames import FrameType, data, goaway
from tests.support.http2_peer import ANSWER, message

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
HEADERS, CONTINUATION = FrameType.HEADERS, FrameType.CONTINUATION
PART = bytes(16_384)


@pytest.fixture
async def talk() -> AsyncIterator[StreamSetup]:
    async with talking() as talk:
        yield talk


OPEN_BLOCK = frames.frame(HEADERS, 0, 1, b"\x88")  # `:status: 200`, and more to come
UNPACKS_TO_160_KB = b"\x40\x01n\x7f\xa1\x1e" + b"v" * 4000 + b"\xbe" * 40
VIOLATIONS = {
    "HPACK": (frames.frame(HEADERS, 0x4, 1, b"\xff\xff"), "PROTOCOL_ERROR"),
    "half a field": (
        frames.frame(HEADERS, 0x4, 1, frames.literal("a", "b")[:-1]),
        "PROTOCOL_ERROR",
    ),
    "endless headers": (
        OPEN_BLOCK + frames.frame(CONTINUATION, 0, 1, PART) * 64,
        "PROTOCOL_ERROR",
    ),
    "a header block larger than is decoded": (
        OPEN_BLOCK
        + frames.frame(CONTINUATION, 0, 1, b"\x00\x01a\x01b" * 3000) * 9
        + frames.frame(CONTINUATION, 0x4, 1),
        "ENHANCE_YOUR_CALM",
    ),
    "200,000 empty continuations": (
        OPEN_BLOCK
        + frames.frame(CONTINUATION, 0, 1) * 200_000
        + frames.frame(CONTINUATION, 0x4, 1),
        "PROTOCOL_ERROR",
    ),
    "headers that unpack to 160 kB": (
        frames.frame(HEADERS, 0x4, 1, UNPACKS_TO_160_KB),
        "ENHANCE_YOUR_CALM",
    ),
    "another frame inside headers": (
        OPEN_BLOCK + frames.frame(FrameType.PING, 0, 0, bytes(8)),
        "PROTOCOL_ERROR",
    ),
    "a continuation of other headers": (
        OPEN_BLOCK + frames.frame(CONTINUATION, 4, 3),
        "PROTOCOL_ERROR",
    ),
    "a continuation without headers": (frames.frame(CONTINUATION, 4, 1), "PROTOCOL_ERROR"),
    "push": (frames.frame(FrameType.PUSH_PROMISE, 4, 1, bytes(4)), "PROTOCOL_ERROR"),
    "a request": (frames.frame(HEADERS, 0x4, 2, b"\x88"), "PROTOCOL_ERROR"),
    "an unopened stream": (frames.frame(HEADERS, 0x4, 99, b"\x88"), "PROTOCOL_ERROR"),
    "data before headers": (data(1, message(b"early")), "PROTOCOL_ERROR"),
    "data after the end": (
        frames.frame(HEADERS, 0x4, 1, b"\x88") + data(1, b"", end=True) + OPEN_BLOCK[:4] + b"\x04"
        b"\x00\x00\x00\x01\x88",
        "STREAM_CLOSED",
    ),
    "trailers that do not end": (frames.frame(HEADERS, 0x4, 1, b"\x88") * 2, "PROTOCOL_ERROR"),
    "padding": (data(1, b"", padding=0)[:-1] + b"\x01", "PROTOCOL_ERROR"),
    "an overlong frame": (data(1, bytes(16_385)), "FRAME_SIZE_ERROR"),
    "a short frame": (frames.frame(FrameType.RST_STREAM, 0, 1, b"1"), "FRAME_SIZE_ERROR"),
    "half a setting": (frames.frame(FrameType.SETTINGS, 0, 0, bytes(5)), "FRAME_SIZE_ERROR"),
    "a window larger than allowed": (
        frames.settings({SettingCodes.INITIAL_WINDOW_SIZE: 2**31}),
        "FLOW_CONTROL_ERROR",
    ),
    "the stream's window opened by nothing": (frames.window_update(1, 0), "PROTOCOL_ERROR"),
    "the connection's window opened by nothing": (frames.window_update(0, 0), "PROTOCOL_ERROR"),
    "the connection's window opened too wide": (
        frames.window_update(0, 2**31 - 1),
        "FLOW_CONTROL_ERROR",
    ),
}


@pytest.mark.parametrize(("sent", "code"), VIOLATIONS.values(), ids=VIOLATIONS)
async def test_a_peer_that_violates_the_protocol_gets_a_goaway(sent, code, talk):
    """What follows is ignored, and the next call connects anew."""
    call, peer = await talk.start()
    peer.send(sent, peer.headers(1, ANSWER | {"grpc-status": "0"}, end=True))
    error = await error_of(call)
    assert (error.code, "violated HTTP/2" in str(error)) == (UNAVAILABLE, True)
    goaway_frame = await peer.next(FrameType.GOAWAY)
    assert ErrorCodes(frames.number(goaway_frame.payload, 4)) == ErrorCodes[code]
    await peer.closed()
    again, new = await talk.call_new_peer(b"")
    await new.request()
    new.answer(1, b"new")
    assert await all_of(again) == [b"new"]


async def test_a_peer_that_sends_more_than_the_window_gets_a_goaway(talk):
    """What is not read must not fill the memory."""
    call, peer = await talk.start()
    peer.send(peer.headers(1, ANSWER), data(1, message(b"unread")), *[data(1, PART)] * 4)
    goaway_frame = await peer.next(FrameType.GOAWAY)
    assert frames.number(goaway_frame.payload, 4) == ErrorCodes.FLOW_CONTROL_ERROR
    call.close()


async def test_a_peer_that_speaks_http1_is_unavailable(talk):
    """At once: `h2` would take its first bytes for the length of a frame and wait for the rest."""
    calling = asyncio.create_task(talk.client.call(METHOD, b""))
    await talk.peers.accept(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(ServerStreamError, match="does not speak HTTP/2") as caught:
        await calling
    assert caught.value.code is UNAVAILABLE


async def test_a_connection_that_is_cut_ends_its_calls(talk):
    """Also in the middle of a message; complete messages before it are read first."""
    call, peer = await talk.start()
    waiting = await talk.client.call(METHOD, b"")
    await peer.request()
    reading = asyncio.create_task(error_of(waiting))
    peer.send(peer.headers(1, ANSWER), data(1, message(b"complete") + message(b"half")[:-1]))
    assert await call.read() == [b"complete"]
    peer.cut()
    assert (await error_of(call)).code is UNAVAILABLE
    assert (await reading).code is UNAVAILABLE
    assert not talk.client._connections


async def test_a_peer_that_does_not_answer_a_ping_is_left(monkeypatch, talk):
    """After silence, a PING is sent together with the next request."""
    monkeypatch.setattr(connection_module, "PONG_SECONDS", 0.3)
    first, peer = await talk.start()
    assert FrameType.PING not in {frame.type for frame in peer.seen}
    make_silent(talk.client)
    second = await talk.client.call(METHOD, b"")
    await peer.next(FrameType.PING)
    for call in (first, second):
        error = await error_of(call)
        assert (error.code, "silent for 0.3 s" in str(error)) == (UNAVAILABLE, True)
    await peer.closed()
    assert not talk.client._connections


@pytest.mark.parametrize("sign", ["pong", "data"])
async def test_a_peer_that_sends_anything_after_a_ping_is_kept(sign, monkeypatch, talk):
    """A pong or anything else; only one PING is pending at a time."""
    monkeypatch.setattr(connection_module, "PONG_SECONDS", 1.0)
    checked, check = asyncio.Event(), Connection._check_pong

    def check_and_set(connection: Connection, last_read_seconds: float) -> None:
        check(connection, last_read_seconds)
        checked.set()

    monkeypatch.setattr(Connection, "_check_pong", check_and_set)
    call, peer = await talk.start()
    make_silent(talk.client)
    others = [await talk.client.call(METHOD, b"") for _ in range(2)]
    assert [(await peer.request())[0] for _ in others] == [3, 5]
    assert [frame.type for frame in peer.seen].count(FrameType.PING) == 1
    ping = next(frame for frame in peer.seen if frame.type == FrameType.PING)
    if sign == "pong":
        peer.send(frames.frame(FrameType.PING, frames.ACK, 0, ping.payload))
    else:
        peer.send(peer.headers(1, ANSWER), data(1, message(b"sign")))
    await checked.wait()
    await talk.is_well(peer, 7)
    for one in (call, *others):
        one.close()


async def test_closing_the_client_ends_calls_and_connections(talk):
    """Also a connection that only finishes its streams; no task or transport is left."""
    tasks = asyncio.all_tasks()
    old, leaving = await talk.start()
    leaving.send(goaway(1), frames.frame(FrameType.PING, 0, 0, bytes(8)))
    await leaving.next(FrameType.PING, ack=True)
    new, peer = await talk.call_new_peer(b"")
    transports = [one._transport for one in talk.client._connections]
    reading = asyncio.create_task(error_of(old))
    await asyncio.sleep(0)
    await talk.client.close()
    await talk.client.close()
    for error in (await reading, await error_of(new)):
        assert (error.code, "was closed" in str(error)) == (UNAVAILABLE, True)
    for one in (leaving, peer):
        assert frames.number((await one.next(FrameType.GOAWAY)).payload, 4) == ErrorCodes.NO_ERROR
        await one.closed()
    assert len(transports) == 2
    assert all(one is not None and one.is_closing() for one in transports)
    assert not talk.client._connections
    assert asyncio.all_tasks() == tasks


async def test_a_call_that_is_closed_while_it_is_read_ends(talk):
    """A waiting `read` does not wait forever."""
    call, peer = await talk.start()
    reading = asyncio.create_task(error_of(call))
    await asyncio.sleep(0)
    call.close()
    assert (await reading).code is grpc.StatusCode.CANCELLED
    await talk.is_well(peer)


class Slow:
    """Replaces `create_connection`; returns when the test sets `go_on`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.connecting, self.go_on = asyncio.Event(), asyncio.Event()
        self.tries = 0
        loop = asyncio.get_running_loop()
        self._connect = loop.create_connection
        monkeypatch.setattr(loop, "create_connection", self)

    async def __call__(
        self, *arguments: Any, **options: Any
    ) -> tuple[asyncio.Transport, Connection]:
        self.tries += 1
        self.connecting.set()
        await self.go_on.wait()
        return cast(
            tuple[asyncio.Transport, Connection], await self._connect(*arguments, **options)
        )


async def test_closing_the_client_ends_the_wait_for_a_connection(monkeypatch, talk):
    """They get an error, not a cancellation."""
    slow = Slow(monkeypatch)
    calls = [asyncio.create_task(talk.client.call(METHOD, b"")) for _ in range(2)]
    await slow.connecting.wait()
    await talk.client.close()
    for call in calls:
        with pytest.raises(ServerStreamError, match="was closed"):
            await call
    slow.go_on.set()
    assert talk.peers.count == 0
    assert talk.client._connecting is None


async def test_a_caller_that_gives_up_leaves_the_connection_to_the_others(monkeypatch, talk):
    """One attempt serves all calls that wait."""
    slow = Slow(monkeypatch)
    cancelled, stays = (asyncio.create_task(talk.client.call(METHOD, b"")) for _ in range(2))
    await slow.connecting.wait()
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    slow.go_on.set()
    peer = await talk.peers.accept()
    call = await stays
    assert (await peer.request())[0] == 1
    peer.answer(1, b"a")
    assert (await all_of(call), slow.tries) == ([b"a"], 1)


async def test_a_peer_that_cannot_be_connected_to_in_time_is_unavailable(monkeypatch, talk):
    """The next call makes another attempt."""
    monkeypatch.setattr(client_module, "CONNECT_SECONDS", 0.05)
    slow = Slow(monkeypatch)
    with pytest.raises(ServerStreamError, match="TimeoutError") as caught:
        await talk.client.call(METHOD, b"")
    assert caught.value.code is UNAVAILABLE
    monkeypatch.setattr(client_module, "CONNECT_SECONDS", 5.0)
    slow.go_on.set()
    await talk.start()


async def test_a_peer_that_accepts_and_says_nothing_is_unavailable(monkeypatch, talk):
    """A server that is about to stop does so; the wait is that for a connection."""
    monkeypatch.setattr(client_module, "CONNECT_SECONDS", 0.05)
    with pytest.raises(ServerStreamError, match="TimeoutError") as caught:
        await talk.client.call(METHOD, b"ask")
    assert caught.value.code is UNAVAILABLE
    peer = await talk.peers.accept()
    await peer.closed()
    assert FrameType.HEADERS not in {frame.type for frame in peer.seen}


@pytest.mark.parametrize(
    "address", ["triton", "unix:/tmp/triton", "127.0.0.1:99999", "tríton:8001", "a..b:80"]
)
async def test_an_invalid_address_is_unavailable(address):
    """A wrongly configured backend fails alone: other backends of its model are tried."""
    client = ServerStreamClient(address)
    with pytest.raises(ServerStreamError, match="cannot connect") as caught:
        await client.call(METHOD, b"")
    assert caught.value.code is UNAVAILABLE


async def test_a_peer_that_takes_no_streams_is_unavailable(talk):
    """The client does not connect again and again."""
    calling = asyncio.create_task(talk.client.call(METHOD, b""))
    peer = await talk.peers.accept(frames.settings({SettingCodes.MAX_CONCURRENT_STREAMS: 0}))
    with pytest.raises(ServerStreamError, match="allows no streams"):
        await calling
    await peer.closed()
    assert talk.peers.count == 1


async def test_a_client_that_was_closed_connects_no_more(talk):
    """Nothing would close the connection."""
    await talk.client.close()
    with pytest.raises(ServerStreamError, match="was closed"):
        await talk.client.call(METHOD, b"")
    assert talk.peers.count == 0


@pytest.mark.parametrize("closes", [False, True])
async def test_a_connection_is_found_in_the_moment_it_is_made(closes, monkeypatch):
    """By a call or `close`: the connecting task has ended, its callbacks have not run yet."""
    connections: list[Connection] = []

    async def at_once(factory: Any, *_address: Any, **_options: Any) -> tuple[None, Connection]:
        connections.append(factory())
        connections[-1].greeted.set_result(None)
        return None, connections[-1]

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", at_once)
    client = ServerStreamClient("nowhere:1")
    first = asyncio.create_task(client.call(METHOD, b""))
    for _ in range(2):
        await asyncio.sleep(0)
    assert client._connecting is not None
    assert client._connecting.done()
    if closes:
        await client.close()
        assert connections[0].failed == "the connection was closed"
        with pytest.raises(ServerStreamError, match="was closed"):
            await first
    else:
        await client.call(METHOD, b"")  # not in its own task, which would start too late
        await first
    assert len(connections) == 1


async def test_a_large_request_waits_in_place_for_a_peer_that_does_not_read(talk):
    """However large its windows are: only a part of the request is copied to be sent."""
    size = 16 * 1024 * 1024
    wide = frames.settings({SettingCodes.INITIAL_WINDOW_SIZE: 2**31 - 1})
    _, peer = await talk.start(wide)
    peer.send(frames.window_update(0, 2**31 - 1 - 65_535))
    await asyncio.sleep(0.1)
    call = await talk.client.call(METHOD, bytes(size))
    (connection,) = talk.client._connections
    transport = connection._transport
    for _ in range(20):
        await asyncio.sleep(0.01)
        assert transport.get_write_buffer_size() <= 2 * MAX_UNFLUSHED_BYTES
    assert connection._protocol.data_to_send() == b""
    stream_id, _, body = await peer.request()
    assert len(body) == PREFIX.size + size
    peer.answer(stream_id, b"well")
    assert await all_of(call) == [b"well"]
