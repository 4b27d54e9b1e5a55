"""Token streams from peers that do what gRPC servers rarely do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from libs.grpc_stream import connection as connection_module
from tests.support import http2_frames as frames
from tests.support.grpc_stream import METHOD, StreamSetup, all_of, error_of, talking
from tests.support.http2_frames import FrameType, data, goaway
from tests.support.http2_peer import ANSWER, OK, message

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture
async def talk() -> AsyncIterator[StreamSetup]:
    async with talking() as talk:
        yield talk


async def test_a_goaway_ends_the_streams_that_the_peer_did_not_take(talk):
    """The streams that it took finish; new calls use another connection."""
    started, peer = await talk.start()
    other, late = [await talk.client.call(METHOD, b"") for _ in range(2)]
    assert [(await peer.request())[0] for _ in range(2)] == [3, 5]
    peer.send(goaway(3, ErrorCodes.ENHANCE_YOUR_CALM))
    error = await error_of(late)
    assert (error.code, str(error)) == (
        UNAVAILABLE,
        "UNAVAILABLE: the peer is shutting down: ENHANCE_YOUR_CALM",
    )
    new, second = await talk.call_new_peer(b"")
    assert (await second.request())[0] == 1
    second.answer(1, b"new")
    peer.answer(1, b"started")
    peer.answer(3, b"other")
    assert [await all_of(call) for call in (new, started, other)] == [
        [b"new"],
        [b"started"],
        [b"other"],
    ]
    await peer.closed()
    await talk.is_well(second)


async def test_a_goaway_in_two_steps_lets_the_streams_between_finish(talk):
    """The first GOAWAY names the largest stream id, the second the last stream that it took."""
    call, peer = await talk.start()
    peer.send(goaway(frames.MAX_STREAM_ID), frames.frame(FrameType.PING, 0, 0, b"all here"))
    assert (await peer.next(FrameType.PING, ack=True)).payload == b"all here"
    peer.send(goaway(1))
    peer.answer(1, b"done")
    assert await all_of(call) == [b"done"]
    await peer.closed()


async def test_a_goaway_closes_an_idle_connection(talk):
    """The next call connects again."""
    call, peer = await talk.start()
    peer.answer(1)
    assert await all_of(call) == []
    peer.send(goaway(1))
    await peer.closed()
    await talk.start()


async def test_a_stream_that_is_reset_ends_alone(talk):
    """Its error gives the reason."""
    call, peer = await talk.start()
    peer.send(peer.headers(1, ANSWER), data(1, message(b"a")))
    peer.send(frames.rst_stream(1, ErrorCodes.REFUSED_STREAM))
    assert await call.read() == [b"a"]
    error = await error_of(call)
    assert (error.code, "REFUSED_STREAM" in str(error)) == (UNAVAILABLE, True)
    await talk.is_well(peer)


async def test_pings_and_settings_are_answered_and_unknown_frames_are_not(talk):
    """They are ignored (RFC 9113, 4.1)."""
    call, peer = await talk.start()
    assert (FrameType.SETTINGS, frames.ACK) in {(one.type, one.flags) for one in peer.seen}
    priority, alternative, unknown = (
        frames.frame(0x2, 0, 1, bytes(5)),
        frames.frame(0xA, 0, 1, b'\x00\x00h2=":1"'),
        frames.frame(0xEE, 0xFF, 1, b"12345"),
    )
    peer.send(
        priority, alternative, unknown, frames.frame(FrameType.PING, frames.ACK, 0, b"unasked!")
    )
    peer.send(frames.frame(FrameType.PING, 0, 0, b"01234567"))
    pong = await peer.next(FrameType.PING, ack=True)
    assert (pong.payload, pong.stream_id) == (b"01234567", 0)
    peer.answer(1, b"a")
    assert await all_of(call) == [b"a"]


async def test_a_stream_that_a_cancelled_call_left_is_ignored_but_its_headers_count(talk):
    """Later headers refer to what they added to the table; its data opens the window again."""
    call, peer = await talk.start()
    call.close()
    reset = await peer.next(FrameType.RST_STREAM)
    assert (reset.stream_id, frames.number(reset.payload)) == (1, ErrorCodes.CANCEL)
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
    """One byte each; the stream ends with the last part."""
    call, peer = await talk.start()
    fields = ANSWER | {"grpc-status": "5", "grpc-message": "gr%C3%BCn"}
    first, *parts, last = (bytes((byte,)) for byte in peer.block(fields))
    peer.send(
        frames.frame(FrameType.HEADERS, frames.END_STREAM, 1, first),
        *(frames.frame(FrameType.CONTINUATION, 0, 1, part) for part in parts),
        frames.frame(FrameType.CONTINUATION, frames.END_HEADERS, 1, last),
    )
    assert str(await error_of(call)) == "NOT_FOUND: grün"


async def test_padding_is_not_part_of_a_message_and_opens_the_window_again(talk):
    """It counts in the windows, though it is never read."""
    call, peer = await talk.start()
    framed = message(b"x" * 200)
    padded = [data(1, framed[at : at + 1], padding=255) for at in range(len(framed))]
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
async def test_a_message_that_is_refused_ends_its_call(payload, code, talk):
    """After the messages before it; the stream is reset."""
    call, peer = await talk.start()
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
async def test_a_response_without_a_grpc_status_is_an_error(status, fields, talk):
    """A proxy in between may send one; the error gives the HTTP status."""
    call, peer = await talk.start()
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
async def test_a_response_that_ends_inside_a_message_is_an_error(trailers, code, talk):
    """The peer's own error comes first: it says more."""
    call, peer = await talk.start()
    peer.send(peer.headers(1, ANSWER), data(1, message(b"complete") + message(b"half")[:-1]))
    peer.send(peer.headers(1, trailers, end=True))
    assert await call.read() == [b"complete"]
    assert (await error_of(call)).code is code


async def test_an_unknown_status_code_is_unknown(talk):
    """It may come from a later version of gRPC."""
    call, peer = await talk.start()
    peer.send(peer.headers(1, ANSWER | {"grpc-status": "77"}, end=True))
    assert (await error_of(call)).code is grpc.StatusCode.UNKNOWN


async def test_a_stream_that_ends_before_its_request_was_sent_is_reset(talk):
    """Otherwise the peer counts it as open."""
    wide = frames.settings({SettingCodes.INITIAL_WINDOW_SIZE: 200_000})  # the connection's is not
    call, peer = await talk.call_new_peer(bytes(100_000), wide)
    peer.send(peer.headers(1, ANSWER | {"grpc-status": "7"}, end=True))
    assert (await error_of(call)).code is grpc.StatusCode.PERMISSION_DENIED
    assert (await peer.next(FrameType.RST_STREAM)).stream_id == 1
    peer.send(frames.window_update(0, 100_000), frames.window_update(1, 100_000))
    await talk.is_well(peer)
    assert sum(len(one.payload) for one in peer.seen if one.type == FrameType.DATA) == 65_535 + 5


async def test_a_limit_of_one_stream_leads_to_more_connections(talk):
    """When a stream has ended, the next can use its connection."""
    first, peer = await talk.start(frames.settings({SettingCodes.MAX_CONCURRENT_STREAMS: 1}))
    second, other = await talk.call_new_peer(b"")
    assert (await other.request())[0] == 1
    peer.answer(1, b"first")
    assert await all_of(first) == [b"first"]
    await talk.is_well(peer)
    other.answer(1, b"second")
    assert await all_of(second) == [b"second"]
    assert talk.peers.count == 2


@pytest.mark.parametrize("kind", ["headers", "trailers", "trailers only"])
@pytest.mark.parametrize("size", [70_000, 120_000])
async def test_headers_that_are_too_large_end_their_own_stream_only(size, kind, talk):
    """They are still decoded: later headers refer to what they added to the table."""
    call, peer = await talk.start()
    other = await talk.client.call(METHOD, b"")
    assert (await peer.request())[0] == 3
    end = kind != "headers"
    if kind == "trailers":
        peer.send(peer.headers(1, ANSWER), data(1, message(b"before")))
        assert await call.read() == [b"before"]
    large = peer.block({"x-seen": "y" * 50, "grpc-status": "5", "grpc-message": "m" * size})
    parts = [large[at : at + 16_384] for at in range(0, len(large), 16_384)]
    peer.send(
        frames.frame(FrameType.HEADERS, end * frames.END_STREAM, 1, parts[0]),
        *(frames.frame(FrameType.CONTINUATION, 0, 1, part) for part in parts[1:]),
        frames.frame(FrameType.CONTINUATION, frames.END_HEADERS, 1),
    )
    error = await error_of(call)
    assert (error.code, "the limit is 65536" in str(error)) == (UNAVAILABLE, True)
    if not end:
        assert (await peer.next(FrameType.RST_STREAM)).stream_id == 1
    peer.send(peer.headers(3, ANSWER | {"x-seen": "y" * 50}), data(3, message(b"other")))
    peer.send(peer.headers(3, {"grpc-status": "7", "grpc-message": "mine"}, end=True))
    assert await other.read() == [b"other"]
    assert str(await error_of(other)) == "PERMISSION_DENIED: mine"
    await talk.is_well(peer, 5)


async def test_many_continuations_of_allowed_headers_are_accepted(talk):
    """The bound counts frames; 64 of the usual size hold far more than is allowed."""
    call, peer = await talk.start()
    block = peer.block(ANSWER | {"grpc-status": "5", "grpc-message": "x" * 60_000})
    step = len(block) // 60
    parts = [block[at : at + step] for at in range(0, len(block), step)]
    peer.send(
        frames.frame(FrameType.HEADERS, frames.END_STREAM, 1, parts[0]),
        *(frames.frame(FrameType.CONTINUATION, 0, 1, part) for part in parts[1:]),
        frames.frame(FrameType.CONTINUATION, frames.END_HEADERS, 1),
    )
    assert str(await error_of(call)) == f"NOT_FOUND: {'x' * 60_000}"


@pytest.mark.parametrize("last", ["data", "trailers"])
async def test_only_what_ends_the_stream_carries_the_status(last, talk):
    """A status in headers that do not end the stream is ignored."""
    call, peer = await talk.start()
    peer.send(peer.headers(1, ANSWER | OK), data(1, message(b"a"), end=last == "data"))
    if last == "trailers":
        peer.send(peer.headers(1, {"x-other": "1"}, end=True))
    assert await call.read() == [b"a"]
    assert str(await error_of(call)) == "UNAVAILABLE: the response has no gRPC status: HTTP 200"


@pytest.mark.parametrize("details", ["ends with a space ", "with\ttab", "grün".encode("latin-1")])
async def test_an_unusual_message_of_a_status_ends_its_own_stream_only(details, talk):
    """Servers send such messages; strict validation would end the connection."""
    call, peer = await talk.start()
    peer.send(peer.headers(1, ANSWER | {"grpc-status": "13", "grpc-message": details}, end=True))
    assert (await error_of(call)).code is grpc.StatusCode.INTERNAL
    await talk.is_well(peer)


async def test_informational_headers_are_skipped(talk):
    """However many come before the response."""
    call, peer = await talk.start()
    peer.send(*(peer.headers(1, {":status": "103", "grpc-status": "5"}) for _ in range(3)))
    peer.answer(1, b"a")
    assert await all_of(call) == [b"a"]


async def test_all_messages_of_one_socket_read_come_in_one_read(talk):
    """A reader wakes once for them, in whatever frames they come, also with the end."""
    call, peer = await talk.start()
    reading = asyncio.create_task(call.read())
    bodies = [message(b"%d" % index) for index in range(200)]
    peer.send(
        peer.headers(1, ANSWER),
        *(data(1, body) for body in bodies[:100]),
        data(1, b"".join(bodies[100:])),
        peer.headers(1, OK, end=True),
    )
    assert len(await reading) == 200
    assert await call.read() == []


async def test_a_response_that_ends_in_the_read_that_fills_the_window_is_complete(talk):
    """No WINDOW_UPDATE may be sent for the stream, which has ended by then."""
    call, peer = await talk.start()
    peer.send(
        peer.headers(1, ANSWER),
        data(1, message(b"x" * 60_000)[:16_000]),
        *(data(1, b"x" * 11_001) for _ in range(4)),
        data(1, b"x"),
        peer.headers(1, OK, end=True),
    )
    assert await all_of(call) == [b"x" * 60_000]
    await talk.is_well(peer)


async def test_a_window_that_overflows_ends_its_own_stream_only(talk):
    """As RFC 9113, 6.9.1 asks for."""
    call, peer = await talk.call_new_peer(bytes(100_000))
    peer.send(*[frames.window_update(1, 2**31 - 1)] * 2)
    error = await error_of(call)
    assert (error.code, "FLOW_CONTROL_ERROR" in str(error)) == (UNAVAILABLE, True)
    assert (await peer.next(FrameType.RST_STREAM)).stream_id == 1
    peer.send(frames.window_update(0, 2**30))
    await talk.is_well(peer)
