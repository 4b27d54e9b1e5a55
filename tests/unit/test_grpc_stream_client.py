"""Deadlines of calls, and how many connections a client keeps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from h2.settings import SettingCodes
from hypothesis import given
from hypothesis import strategies as st

from libs.grpc_stream import ServerStreamError
from libs.grpc_stream import client as client_module
from libs.grpc_stream.client import format_timeout
from tests.support import http2_frames as frames
from tests.support.grpc_stream import METHOD, StreamSetup, all_of, error_of, talking
from tests.support.http2_frames import FrameType, data
from tests.support.http2_peer import ANSWER, message

DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED
UNIT_SECONDS = {"u": 1e-6, "m": 1e-3, "S": 1, "M": 60, "H": 3600}
ONE_STREAM = frames.settings({SettingCodes.MAX_CONCURRENT_STREAMS: 1})


@pytest.fixture
async def talk() -> AsyncIterator[StreamSetup]:
    async with talking() as talk:
        yield talk


@pytest.mark.parametrize(
    ("seconds", "formatted"),
    [
        (0, "0u"),
        (1e-9, "1u"),
        (0.25, "250000u"),
        (99.999999, "99999999u"),
        (100, "100000m"),
        (100_000, "100000S"),
        (1e8, "1666667M"),
        (6e9, "1666667H"),
        (1e15, "99999999H"),
        (float("inf"), "99999999H"),
    ],
)
def test_a_timeout_is_formatted_in_the_finest_unit_that_fits(seconds, formatted):
    """As gRPC over HTTP/2 defines `grpc-timeout`."""
    assert format_timeout(seconds) == formatted


@given(st.floats(0, 3e11))
def test_a_formatted_timeout_has_eight_digits_at_most_and_is_not_shorter(seconds):
    """A server must not give up before its client does."""
    value, unit = format_timeout(seconds)[:-1], format_timeout(seconds)[-1]
    assert 1 <= len(value) <= 8
    assert int(value) * UNIT_SECONDS[unit] - seconds + 1e-6 * seconds >= 0
    assert int(value) * UNIT_SECONDS[unit] - seconds <= UNIT_SECONDS[unit] * 1.001 + 1e-6 * seconds


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_a_timeout_that_is_no_time_is_refused(seconds):
    """It would be sent as a value that no server can read."""
    with pytest.raises(ValueError, match="invalid timeout"):
        format_timeout(seconds)


async def test_the_server_receives_what_is_left_of_the_timeout(talk):
    """A call without one sends no header."""
    first, peer = await talk.start()
    await talk.client.call(METHOD, b"", (("name", "value"),), timeout_seconds=30)
    _, headers, _ = await peer.request()
    assert 29e6 < int(headers["grpc-timeout"].removesuffix("u")) <= 30e6
    assert headers["name"] == "value"
    await talk.client.call(METHOD, b"")
    assert "grpc-timeout" not in (await peer.request())[1]
    first.close()


async def test_a_call_ends_when_its_deadline_passes(talk):
    """Also where the server does not end it; what arrived before can be read."""
    first, peer = await talk.start()
    call = await talk.client.call(METHOD, b"", timeout_seconds=0.2)
    await peer.request()
    peer.send(peer.headers(3, ANSWER), data(3, message(b"before")))
    assert await call.read() == [b"before"]
    assert (await error_of(call)).code is DEADLINE_EXCEEDED
    assert (await peer.next(FrameType.RST_STREAM)).stream_id == 3
    first.close()


async def test_a_call_that_ended_in_time_stays_as_it_is(talk):
    """Its timer is cancelled."""
    first, peer = await talk.start()
    call = await talk.client.call(METHOD, b"", timeout_seconds=0.1)
    await peer.request()
    peer.answer(3, b"a")
    assert await all_of(call) == [b"a"]
    await asyncio.sleep(0.15)
    assert await call.read() == []
    first.close()


async def test_connecting_counts_to_the_timeout(talk):
    """A peer that does not greet is not waited for beyond the deadline."""
    with pytest.raises(ServerStreamError) as caught:
        await talk.client.call(METHOD, b"", timeout_seconds=0.05)
    assert caught.value.code is DEADLINE_EXCEEDED
    peer = await talk.peers.accept()  # others can still use the connection
    await talk.is_well(peer, 1)


@pytest.mark.parametrize("seconds", [0, -1])
async def test_a_call_whose_deadline_has_passed_is_not_sent(seconds, talk):
    """The server would work for no one."""
    first, peer = await talk.start()
    with pytest.raises(ServerStreamError) as caught:
        await talk.client.call(METHOD, b"", timeout_seconds=seconds)
    assert caught.value.code is DEADLINE_EXCEEDED
    await talk.is_well(peer, 3)
    first.close()


async def test_further_connections_are_closed_when_they_are_idle(monkeypatch, talk):
    """Those that the peer's limit of streams asked for; the first one stays."""
    monkeypatch.setattr(client_module, "EXTRA_CONNECTION_IDLE_SECONDS", 0.1)
    first, peer = await talk.start(ONE_STREAM)
    second, idle = await talk.call_new_peer(b"", ONE_STREAM)
    third, busy = await talk.call_new_peer(b"", ONE_STREAM)
    for one, call in ((peer, first), (idle, second)):
        one.answer(1, b"done")
        assert await all_of(call) == [b"done"]
    await idle.closed()
    await talk.is_well(peer)
    busy.answer(1, b"late")
    assert await all_of(third) == [b"late"]
    await busy.closed()
    await asyncio.sleep(0.25)
    await talk.is_well(peer, 5)
    assert len(talk.client._connections) == 1


async def test_a_connection_that_is_used_again_is_not_idle(talk):
    """Its time counts from the end of its last stream."""
    first, _ = await talk.start(ONE_STREAM)
    second, other = await talk.call_new_peer(b"", ONE_STREAM)
    await other.request()
    other.answer(1, b"done")
    assert await all_of(second) == [b"done"]
    for connection in talk.client._connections:
        connection.idle_since_seconds -= 3600
    await talk.is_well(other)
    talk.client._close_idle()
    await talk.is_well(other, 5)
    talk.client._connections[1].idle_since_seconds -= 3600
    talk.client._close_idle()
    await other.closed()
    first.close()
