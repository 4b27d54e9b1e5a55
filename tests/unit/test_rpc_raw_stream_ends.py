"""Calls as bytes, and how their connections begin and end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import grpc
import pytest

from libs.http2 import connection as connection_module
from libs.http2 import frames
from libs.http2.connection import Connection
from libs.http2.frames import ErrorCode, FrameType, Setting
from libs.rpc import raw_stream
from libs.rpc.raw_stream import RawCallError, RawClient
from tests.support.http2_peer import ANSWER, data, goaway, message
from tests.support.raw_calls import METHOD, Talk, all_of, error_of, fall_silent, talking

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
HEADERS, CONTINUATION = FrameType.HEADERS, FrameType.CONTINUATION
PART = bytes(16_384)


@pytest.fixture
async def talk() -> AsyncIterator[Talk]:
    async with talking() as talk:
        yield talk


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", "FRAME_SIZE_ERROR", id="HTTP/1"),
        pytest.param(frames.frame(HEADERS, 0x4, 1, b"\xff\xff"), "COMPRESSION_ERROR", id="HPACK"),
        pytest.param(
            frames.frame(HEADERS, 0x4, 1, frames.literal("a", "b")[:-1]),
            "COMPRESSION_ERROR",
            id="half a field",
        ),
        pytest.param(
            frames.frame(HEADERS, 0x4, 1, b"\x00\x01n\x01\xff"),
            "COMPRESSION_ERROR",
            id="no UTF-8",
        ),
        pytest.param(
            frames.frame(HEADERS, 0, 1, PART) + frames.frame(CONTINUATION, 0, 1, PART) * 4,
            "ENHANCE_YOUR_CALM",
            id="headers without bounds",
        ),
        pytest.param(
            frames.frame(HEADERS, 0x4, 1, b"\x40\x01n\x7f\x81\x1f" + b"v" * 4000 + b"\xbe" * 20),
            "COMPRESSION_ERROR",
            id="headers that unpack without bounds",
        ),
        pytest.param(
            frames.frame(HEADERS, 0, 1) + frames.frame(FrameType.PING, 0, 0, bytes(8)),
            "PROTOCOL_ERROR",
            id="half of the headers",
        ),
        pytest.param(
            frames.frame(HEADERS, 0, 1) + frames.frame(CONTINUATION, 4, 3),
            "PROTOCOL_ERROR",
            id="the rest of other headers",
        ),
        pytest.param(frames.frame(CONTINUATION, 4, 1), "PROTOCOL_ERROR", id="the rest of none"),
        pytest.param(
            frames.frame(FrameType.PUSH_PROMISE, 4, 1, bytes(4)), "PROTOCOL_ERROR", id="push"
        ),
        pytest.param(data(1, b"", padding=0)[:-1] + b"\x01", "PROTOCOL_ERROR", id="padding"),
        pytest.param(
            frames.frame(FrameType.RST_STREAM, 0, 1, b"1"), "FRAME_SIZE_ERROR", id="short"
        ),
        pytest.param(
            frames.frame(FrameType.SETTINGS, 0, 0, bytes(5)),
            "FRAME_SIZE_ERROR",
            id="half a setting",
        ),
        pytest.param(
            frames.settings({Setting.INITIAL_WINDOW_SIZE: 2**31}),
            "FLOW_CONTROL_ERROR",
            id="a window larger than can be",
        ),
    ],
)
async def test_a_peer_that_breaks_the_protocol_is_told_and_left(sent, code, talk):
    """What follows is not even looked at, and the next call connects anew."""
    call, peer = await talk.begin()
    peer.send(sent, peer.headers(1, ANSWER | {"grpc-status": "0"}, end=True))
    error = await error_of(call)
    assert (error.code, "broke HTTP/2" in str(error)) == (UNAVAILABLE, True)
    told = await peer.next(FrameType.GOAWAY)
    assert frames.number(told.payload, 4) == ErrorCode[code]
    await peer.closed()
    again, new = await talk.call_new_peer(b"")
    await new.request()
    new.answer(1, b"new")
    assert await all_of(again) == [b"new"]


async def test_a_connection_that_is_cut_ends_its_calls(talk):
    """Also in the middle of a message; whole ones before it are read first."""
    call, peer = await talk.begin()
    waiting = await talk.client.call(METHOD, b"")
    await peer.request()
    reading = asyncio.create_task(error_of(waiting))
    peer.send(peer.headers(1, ANSWER), data(1, message(b"whole") + message(b"half")[:-1]))
    assert await call.read() == [b"whole"]
    peer.cut()
    assert (await error_of(call)).code is UNAVAILABLE
    assert (await reading).code is UNAVAILABLE
    assert not talk.client._connections


async def test_a_peer_that_does_not_answer_whether_it_lives_is_left(monkeypatch, talk):
    """It is asked together with a request, once it was silent for long."""
    monkeypatch.setattr(connection_module, "PONG_SECONDS", 0.3)
    first, peer = await talk.begin()
    assert FrameType.PING not in {frame.type for frame in peer.seen}
    fall_silent(talk.client)
    second = await talk.client.call(METHOD, b"")
    await peer.next(FrameType.PING)
    for call in (first, second):
        error = await error_of(call)
        assert (error.code, "silent for 0.3 s" in str(error)) == (UNAVAILABLE, True)
    await peer.closed()
    assert not talk.client._connections


@pytest.mark.parametrize("sign", ["pong", "data"])
async def test_a_peer_that_gives_a_sign_of_life_is_kept(sign, monkeypatch, talk):
    """Whichever; only one question is open at a time."""
    monkeypatch.setattr(connection_module, "PONG_SECONDS", 1.0)
    looked, look = asyncio.Event(), Connection._look_for_pong

    def look_and_tell(connection: Connection, heard_seconds: float) -> None:
        look(connection, heard_seconds)
        looked.set()

    monkeypatch.setattr(Connection, "_look_for_pong", look_and_tell)
    call, peer = await talk.begin()
    fall_silent(talk.client)
    others = [await talk.client.call(METHOD, b"") for _ in range(2)]
    assert [(await peer.request())[0] for _ in others] == [3, 5]
    assert [frame.type for frame in peer.seen].count(FrameType.PING) == 1
    ping = next(frame for frame in peer.seen if frame.type == FrameType.PING)
    if sign == "pong":
        peer.send(frames.frame(FrameType.PING, frames.ACK, 0, ping.payload))
    else:
        peer.send(peer.headers(1, ANSWER), data(1, message(b"sign")))
    await looked.wait()
    await talk.is_well(peer, 7)
    for one in (call, *others):
        one.close()


async def test_closing_the_client_ends_calls_and_connections(talk):
    """Also a connection that only finished what it had; no task or transport is left."""
    tasks = asyncio.all_tasks()
    old, leaving = await talk.begin()
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
        assert frames.number((await one.next(FrameType.GOAWAY)).payload, 4) == ErrorCode.NO_ERROR
        await one.closed()
    assert len(transports) == 2
    assert all(one is not None and one.is_closing() for one in transports)
    assert not talk.client._connections
    assert asyncio.all_tasks() == tasks


async def test_a_call_that_is_closed_while_it_is_read_ends(talk):
    """Nobody waits for what cannot come."""
    call, peer = await talk.begin()
    reading = asyncio.create_task(error_of(call))
    await asyncio.sleep(0)
    call.close()
    assert (await reading).code is grpc.StatusCode.CANCELLED
    await talk.is_well(peer)


class Slow:
    """Stands in for `create_connection`, which returns when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.connecting, self.go_on = asyncio.Event(), asyncio.Event()
        self.tries = 0
        loop = asyncio.get_running_loop()
        self._connect = loop.create_connection
        monkeypatch.setattr(loop, "create_connection", self)

    async def __call__(self, *arguments: Any) -> tuple[asyncio.Transport, Connection]:
        self.tries += 1
        self.connecting.set()
        await self.go_on.wait()
        return cast(tuple[asyncio.Transport, Connection], await self._connect(*arguments))


async def test_who_waits_for_a_connection_when_the_client_is_closed_is_told(monkeypatch, talk):
    """By an error, not by a cancellation that nobody asked for."""
    slow = Slow(monkeypatch)
    calls = [asyncio.create_task(talk.client.call(METHOD, b"")) for _ in range(2)]
    await slow.connecting.wait()
    await talk.client.close()
    for call in calls:
        with pytest.raises(RawCallError, match="was closed"):
            await call
    slow.go_on.set()
    assert talk.peers.count == 0
    assert talk.client._connecting is None


async def test_a_caller_that_gives_up_leaves_the_connection_to_the_others(monkeypatch, talk):
    """One try serves all who wait."""
    slow = Slow(monkeypatch)
    gone, stays = (asyncio.create_task(talk.client.call(METHOD, b"")) for _ in range(2))
    await slow.connecting.wait()
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    slow.go_on.set()
    peer = await talk.peers.accept()
    call = await stays
    assert (await peer.request())[0] == 1
    peer.answer(1, b"a")
    assert (await all_of(call), slow.tries) == ([b"a"], 1)


async def test_a_peer_that_cannot_be_connected_to_in_time_is_unavailable(monkeypatch, talk):
    """The next call tries again."""
    monkeypatch.setattr(raw_stream, "CONNECT_SECONDS", 0.05)
    slow = Slow(monkeypatch)
    with pytest.raises(RawCallError, match="TimeoutError") as caught:
        await talk.client.call(METHOD, b"")
    assert caught.value.code is UNAVAILABLE
    monkeypatch.setattr(raw_stream, "CONNECT_SECONDS", 5.0)
    slow.go_on.set()
    await talk.begin()


async def test_a_peer_that_accepts_and_says_nothing_is_unavailable(monkeypatch, talk):
    """A server that is about to stop does so; it must not be waited for as for an answer."""
    monkeypatch.setattr(raw_stream, "CONNECT_SECONDS", 0.05)
    with pytest.raises(RawCallError, match="TimeoutError") as caught:
        await talk.client.call(METHOD, b"ask")
    assert caught.value.code is UNAVAILABLE
    peer = await talk.peers.accept()
    await peer.closed()
    assert FrameType.HEADERS not in {frame.type for frame in peer.seen}


@pytest.mark.parametrize(
    "address", ["triton", "unix:/tmp/triton", "127.0.0.1:99999", "tríton:8001", "a..b:80"]
)
async def test_what_is_no_address_is_unavailable(address):
    """One backend that is set up wrongly fails alone: the others of its model are tried."""
    client = RawClient(address)
    with pytest.raises(RawCallError, match="cannot connect") as caught:
        await client.call(METHOD, b"")
    assert caught.value.code is UNAVAILABLE


async def test_a_peer_that_takes_no_streams_is_unavailable(talk):
    """It is not connected to again and again."""
    calling = asyncio.create_task(talk.client.call(METHOD, b""))
    peer = await talk.peers.accept(frames.settings({Setting.MAX_CONCURRENT_STREAMS: 0}))
    with pytest.raises(RawCallError, match="takes no streams"):
        await calling
    await peer.closed()
    assert talk.peers.count == 1


async def test_a_client_that_was_closed_connects_no_more(talk):
    """Nobody would close the connection."""
    await talk.client.close()
    with pytest.raises(RawCallError, match="was closed"):
        await talk.client.call(METHOD, b"")
    assert talk.peers.count == 0


@pytest.mark.parametrize("closes", [False, True])
async def test_a_connection_is_found_in_the_moment_in_which_it_is_made(closes, monkeypatch):
    """By a call or a close: the task that connects has ended, and its callbacks have not run."""
    connections: list[Connection] = []

    async def at_once(factory: Any, *_address: Any) -> tuple[None, Connection]:
        connections.append(factory())
        connections[-1].greeted.set_result(None)
        return None, connections[-1]

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", at_once)
    client = RawClient("nowhere:1")
    first = asyncio.create_task(client.call(METHOD, b""))
    for _ in range(2):
        await asyncio.sleep(0)
    assert client._connecting is not None
    assert client._connecting.done()
    if closes:
        await client.close()
        assert connections[0].failed == "the connection was closed"
        with pytest.raises(RawCallError, match="was closed"):
            await first
    else:
        await client.call(METHOD, b"")  # in no task of its own: it would begin too late
        await first
    assert len(connections) == 1


@pytest.mark.parametrize(
    ("seconds", "header"),
    [(0.25, "250000u"), (99.9, "99900000u"), (100.0, "100000m"), (10.0**6, "1000000S")],
)
def test_a_timeout_is_sent_in_the_units_of_grpc(seconds, header):
    """A number of at most eight digits and a unit."""
    assert raw_stream._grpc_timeout(seconds) == header


async def test_a_call_ends_at_its_timeout(talk):
    """The server is told it, too; messages that came before are read first."""
    calling = asyncio.create_task(talk.client.call(METHOD, b"ask", timeout_seconds=0.2))
    peer = await talk.peers.accept()
    call = await calling
    _, headers, _ = await peer.request()
    assert 0 < int(headers["grpc-timeout"].removesuffix("u")) <= 200_000
    peer.send(peer.headers(1, ANSWER), data(1, message(b"first")))
    assert await call.read() == [b"first"]
    assert (await error_of(call)).code is grpc.StatusCode.DEADLINE_EXCEEDED
    await talk.is_well(peer)


async def test_connecting_is_part_of_the_timeout(talk):
    """A peer that accepts the connection and does not greet."""
    with pytest.raises(RawCallError) as caught:
        await talk.client.call(METHOD, b"", timeout_seconds=0.1)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
