"""Calls as bytes, to peers that do what the protocol allows and servers of gRPC rarely do."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest

from libs.http2 import connection as connection_module
from libs.http2 import frames
from libs.http2.frames import ErrorCode, FrameType, Setting
from tests.support.http2_peer import ANSWER, OK, data, goaway, message
from tests.support.raw_calls import METHOD, Talk, all_of, error_of, talking

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture
async def talk() -> AsyncIterator[Talk]:
    async with talking() as talk:
        yield talk


async def test_a_peer_that_goes_away_ends_what_it_has_not_begun(talk):
    """What it has begun it finishes; new calls go elsewhere; then the connection is closed."""
    begun, peer = await talk.begin()
    other, late = [await talk.client.call(METHOD, b"") for _ in range(2)]
    assert [(await peer.request())[0] for _ in range(2)] == [3, 5]
    peer.send(goaway(3, ErrorCode.ENHANCE_YOUR_CALM))
    error = await error_of(late)
    assert (error.code, str(error)) == (
        UNAVAILABLE,
        "UNAVAILABLE: the peer goes away: ENHANCE_YOUR_CALM",
    )
    new, second = await talk.call_new_peer(b"")
    assert (await second.request())[0] == 1
    second.answer(1, b"new")
    peer.answer(1, b"begun")
    peer.answer(3, b"other")
    assert [await all_of(call) for call in (new, begun, other)] == [
        [b"new"],
        [b"begun"],
        [b"other"],
    ]
    await peer.closed()
    await talk.is_well(second)


async def test_a_peer_that_goes_away_in_two_steps_finishes_what_came_between(talk):
    """First it names a stream that cannot be, then the last that it took."""
    call, peer = await talk.begin()
    peer.send(goaway(frames.MAX_STREAM_ID), frames.frame(FrameType.PING, 0, 0, b"all here"))
    assert (await peer.next(FrameType.PING, ack=True)).payload == b"all here"
    peer.send(goaway(1))
    peer.answer(1, b"done")
    assert await all_of(call) == [b"done"]
    await peer.closed()


async def test_a_peer_that_goes_away_while_nothing_runs_is_left(talk):
    """The next call finds it where it listens."""
    call, peer = await talk.begin()
    peer.answer(1)
    assert await all_of(call) == []
    peer.send(goaway(1))
    await peer.closed()
    await talk.begin()


async def test_a_stream_that_is_reset_ends_alone(talk):
    """Its error says why."""
    call, peer = await talk.begin()
    peer.send(peer.headers(1, ANSWER), data(1, message(b"a")))
    peer.send(frames.rst_stream(1, ErrorCode.REFUSED_STREAM))
    assert await call.read() == [b"a"]
    error = await error_of(call)
    assert (error.code, "REFUSED_STREAM" in str(error)) == (UNAVAILABLE, True)
    await talk.is_well(peer)


async def test_pings_and_settings_are_answered_and_unknown_frames_are_not(talk):
    """Nor do they harm (RFC 9113, 4.1)."""
    call, peer = await talk.begin()
    assert (FrameType.SETTINGS, frames.ACK) in {(one.type, one.flags) for one in peer.seen}
    unknown = [bytes((0, 0, 5, kind, 0xFF, 0, 0, 0, 1)) + b"12345" for kind in (0x2, 0xA, 0xEE)]
    peer.send(*unknown, frames.frame(FrameType.PING, frames.ACK, 0, b"unasked!"))
    peer.send(frames.frame(FrameType.PING, 0, 0, b"01234567"))
    pong = await peer.next(FrameType.PING, ack=True)
    assert (pong.payload, pong.stream_id) == (b"01234567", 0)
    peer.answer(1, b"a")
    assert await all_of(call) == [b"a"]


async def test_a_stream_that_a_cancelled_call_left_is_ignored_but_its_headers_count(talk):
    """Later headers refer to what they put into the table; its data makes room again."""
    call, peer = await talk.begin()
    call.close()
    reset = await peer.next(FrameType.RST_STREAM)
    assert (reset.stream_id, frames.number(reset.payload)) == (1, ErrorCode.CANCEL)
    peer.send(peer.headers(1, ANSWER | {"x-much": "y" * 100}))
    half = connection_module.CONNECTION_WINDOW_BYTES // 2
    peer.send(*(data(1, bytes(16_384)) for _ in range(-(-half // 16_384))))
    update = await peer.next(FrameType.WINDOW_UPDATE)
    assert (update.stream_id, frames.number(update.payload)) == (0, half)
    fields = ANSWER | {"x-much": "y" * 100, "grpc-status": "5", "grpc-message": "gone"}
    second = await talk.client.call(METHOD, b"")
    assert (await peer.request())[0] == 3
    peer.send(peer.headers(3, fields, end=True))
    assert str(await error_of(second)) == "NOT_FOUND: gone"


async def test_headers_may_come_in_parts(talk):
    """Of one byte each; the stream ends with the last part."""
    call, peer = await talk.begin()
    peer.answer(99, b"nobody asked")
    fields = ANSWER | {"grpc-status": "5", "grpc-message": "gr%C3%BCn"}
    first, *parts, last = (bytes((byte,)) for byte in peer.block(fields))
    peer.send(
        frames.frame(FrameType.HEADERS, frames.END_STREAM, 1, first),
        *(frames.frame(FrameType.CONTINUATION, 0, 1, part) for part in parts),
        frames.frame(FrameType.CONTINUATION, frames.END_HEADERS, 1, last),
    )
    assert str(await error_of(call)) == "NOT_FOUND: grün"


async def test_padding_is_no_part_of_a_message_and_makes_room_again(talk):
    """It counts in the windows, though nobody reads it."""
    call, peer = await talk.begin()
    whole = message(b"x" * 200)
    padded = [data(1, whole[at : at + 1], padding=255) for at in range(len(whole))]
    peer.send(peer.headers(1, ANSWER), *padded)
    update = await peer.next(FrameType.WINDOW_UPDATE)
    assert update.stream_id == 1
    assert frames.number(update.payload) >= frames.DEFAULT_WINDOW_BYTES // 2
    peer.send(data(1, message(b"y"), padding=0), peer.headers(1, OK, end=True))
    assert await all_of(call) == [b"x" * 200, b"y"]


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (message(b"zipped", compressed=True), grpc.StatusCode.INTERNAL),
        (b"\x00\x04\x00\x00\x01", grpc.StatusCode.RESOURCE_EXHAUSTED),  # 64 MiB and a byte
    ],
)
async def test_a_message_that_cannot_be_taken_ends_its_call(payload, code, talk):
    """After those before it; the peer is told to stop."""
    call, peer = await talk.begin()
    peer.send(peer.headers(1, ANSWER), data(1, message(b"a") + payload))
    assert await call.read() == [b"a"]
    assert (await error_of(call)).code is code
    assert (await peer.next(FrameType.RST_STREAM)).stream_id == 1
    peer.send(data(1, b"more"), peer.headers(1, OK, end=True))
    await talk.is_well(peer)


@pytest.mark.parametrize(
    ("status", "fields"),
    [("200", None), ("503", {}), ("200", {"grpc-message": "no status"})],
)
async def test_an_answer_without_grpcs_status_is_an_error(status, fields, talk):
    """A proxy in between may give one; it says what HTTP's was."""
    call, peer = await talk.begin()
    peer.send(peer.headers(1, {":status": status}, end=fields == {}))
    if fields is None:
        peer.send(data(1, message(b"a"), end=True))
        assert await call.read() == [b"a"]
    elif fields:
        peer.send(peer.headers(1, fields, end=True))
    error = await error_of(call)
    assert (error.code, f"HTTP {status}" in str(error)) == (UNAVAILABLE, True)


@pytest.mark.parametrize(
    ("trailers", "code"),
    [(OK, grpc.StatusCode.INTERNAL), ({"grpc-status": "9"}, grpc.StatusCode.FAILED_PRECONDITION)],
)
async def test_half_a_message_is_never_a_good_end(trailers, code, talk):
    """The peer's own error says more."""
    call, peer = await talk.begin()
    peer.send(peer.headers(1, ANSWER), data(1, message(b"whole") + message(b"half")[:-1]))
    peer.send(peer.headers(1, trailers, end=True))
    assert await call.read() == [b"whole"]
    assert (await error_of(call)).code is code


async def test_a_status_that_nobody_knows_is_unknown(talk):
    """It may be of a later gRPC."""
    call, peer = await talk.begin()
    peer.send(peer.headers(1, ANSWER | {"grpc-status": "77"}, end=True))
    assert (await error_of(call)).code is grpc.StatusCode.UNKNOWN


async def test_a_stream_that_ends_before_its_request_was_sent_is_reset(talk):
    """Otherwise it stays open at the peer, which counts it."""
    wide = frames.settings({Setting.INITIAL_WINDOW_SIZE: 200_000})  # the connection's is not
    call, peer = await talk.call_new_peer(bytes(100_000), wide)
    peer.send(peer.headers(1, ANSWER | {"grpc-status": "7"}, end=True))
    assert (await error_of(call)).code is grpc.StatusCode.PERMISSION_DENIED
    assert (await peer.next(FrameType.RST_STREAM)).stream_id == 1
    peer.send(frames.window_update(0, 100_000), frames.window_update(1, 100_000))
    await talk.is_well(peer)
    assert sum(len(one.payload) for one in peer.seen if one.type == FrameType.DATA) == 65_535 + 5


async def test_a_peer_that_takes_one_stream_at_a_time_gets_more_connections(talk):
    """A stream that has ended makes place for the next."""
    first, peer = await talk.begin(frames.settings({Setting.MAX_CONCURRENT_STREAMS: 1}))
    second, other = await talk.call_new_peer(b"")
    assert (await other.request())[0] == 1
    peer.answer(1, b"first")
    assert await all_of(first) == [b"first"]
    await talk.is_well(peer)
    other.answer(1, b"second")
    assert await all_of(second) == [b"second"]
    assert talk.peers.count == 2
