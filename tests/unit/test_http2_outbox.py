"""Bodies go out as far as a peer's windows reach, and not a byte further."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.http2 import frames
from libs.http2.frames import ErrorCode, Frame, FrameReader, FrameType, ProtocolViolationError
from libs.http2.outbox import Outbox, Outgoing

WINDOW = 65_535


class Wire:
    """An outbox, and the frames that it wrote."""

    def __init__(self) -> None:
        self.sent: list[Frame] = []
        self._reader = FrameReader()
        self.box = Outbox(self._write)

    def of(self, stream_id: int) -> list[Frame]:
        return [frame for frame in self.sent if frame.stream_id == stream_id]

    def size(self, stream_id: int | None = None) -> int:
        chosen = self.sent if stream_id is None else self.of(stream_id)
        return sum(len(frame.payload) for frame in chosen)

    def _write(self, data: bytes) -> None:
        self.sent.extend(self._reader.feed(data))


@pytest.fixture
def wire() -> Wire:
    return Wire()


def ends(sent: list[Frame]) -> list[bool]:
    return [bool(frame.flags & frames.END_STREAM) for frame in sent]


def test_an_empty_body_ends_its_stream_at_once(wire):
    """Also where the windows have no room: an empty frame takes none."""
    wire.box.send(1, bytes(WINDOW))
    wire.box.set_stream_window(0)
    wire.box.send(3, b"")
    assert wire.of(3) == [Frame(FrameType.DATA, frames.END_STREAM, 3, b"")]
    wire.box.grant(None, 10)
    assert len(wire.of(3)) == 1


def test_a_body_is_cut_into_frames_that_the_peer_takes(wire):
    """Of the smallest size that each must take, until it allows more."""
    wire.box.send(1, bytes(40_000))
    assert [len(frame.payload) for frame in wire.of(1)] == [16_384, 16_384, 7_232]
    assert ends(wire.of(1)) == [False, False, True]
    wire.box.max_frame_bytes = 16_385
    wire.box.grant(None, WINDOW)
    wire.box._write = (written := list[bytes]()).append  # longer than a client's reader allows
    wire.box.send(3, bytes(17_000))
    assert [len(data) - 9 for data in written] == [16_385, 615]


def test_a_body_that_fills_the_window_exactly_ends_with_it(wire):
    """No empty frame follows when there is room again."""
    outgoing = wire.box.send(1, bytes(WINDOW))
    assert (wire.size(), ends(wire.sent)[-1]) == (WINDOW, True)
    wire.box.grant(None, WINDOW)
    wire.box.grant(outgoing, WINDOW)
    assert wire.size() == WINDOW
    assert sum(ends(wire.sent)) == 1


@pytest.mark.parametrize("first", ["stream", "connection"])
def test_both_windows_must_have_room(wire, first):
    """Whichever opens first."""
    outgoing = wire.box.send(1, bytes(WINDOW + 100))
    assert wire.size() == WINDOW
    wire.box.grant(outgoing if first == "stream" else None, 30)
    assert wire.size() == WINDOW
    wire.box.grant(None if first == "stream" else outgoing, 40)
    assert wire.size() == WINDOW + 30
    assert sum(ends(wire.sent)) == 0


def test_a_stream_without_room_does_not_hold_up_another(wire):
    """What the connection has is for whoever can use it."""
    wire.box.set_stream_window(10)
    slow, fast = wire.box.send(1, bytes(100)), wire.box.send(3, bytes(100))
    wire.box.grant(fast, 90)
    assert (wire.size(1), wire.size(3)) == (10, 100)
    wire.box.grant(slow, 90)
    assert wire.size(1) == 100


def test_a_window_that_shrank_below_what_was_sent_must_open_that_much_wider(wire):
    """It is negative then (RFC 9113, 6.9.2)."""
    wire.box.grant(None, WINDOW)
    outgoing = wire.box.send(1, bytes(WINDOW + 100))
    wire.box.set_stream_window(35)  # 65,500 less than nothing
    wire.box.grant(outgoing, 65_500)
    assert wire.size() == WINDOW
    wire.box.grant(outgoing, 1)
    assert wire.size() == WINDOW + 1
    wire.box.set_stream_window(100)
    assert wire.size() == WINDOW + 66


def test_new_streams_begin_with_the_window_that_holds_now(wire):
    """Not with the one of when the connection began."""
    wire.box.set_stream_window(10)
    wire.box.send(1, bytes(20))
    wire.box.set_stream_window(12)
    wire.box.send(3, bytes(20))
    assert (wire.size(1), wire.size(3)) == (12, 12)


def test_a_window_larger_than_can_be_is_a_violation(wire):
    """And the largest is none."""
    wire.box.set_stream_window(2**31 - 1)
    with pytest.raises(ProtocolViolationError) as caught:
        wire.box.set_stream_window(2**31)
    assert caught.value.code == ErrorCode.FLOW_CONTROL_ERROR


def test_nothing_more_is_sent_of_a_body_that_was_dropped(wire):
    """Nor does it take room from others, or stay in memory."""
    dropped = wire.box.send(1, bytes(WINDOW + 10))
    kept = wire.box.send(3, bytes(10))
    dropped.drop()
    wire.box.grant(dropped, 100)
    wire.box.grant(None, 10)
    assert (wire.size(1), wire.size(3)) == (WINDOW, 10)
    assert (ends(wire.of(1))[-1], ends(wire.of(3))) == (False, [True])
    assert kept.left == b""
    assert not wire.box._waiting


@dataclass
class Model:
    """What RFC 9113 lets a sender do; the sizes are small, so that windows are often full."""

    connection: int = WINDOW
    initial: int = WINDOW
    windows: dict[int, int] = field(default_factory=dict)
    bodies: dict[int, tuple[Outgoing, bytes]] = field(default_factory=dict)

    def check(self, wire: Wire) -> None:
        room = self.connection - wire.size()
        assert room >= 0
        for stream_id, (outgoing, body) in self.bodies.items():
            sent = wire.of(stream_id)
            data = b"".join(frame.payload for frame in sent)
            assert body.startswith(data)
            assert sum(ends(sent)) == (data == body)
            assert not any(ends(sent)[:-1])
            own = self.windows[stream_id] - len(data)
            waits = data != body and not outgoing.dropped
            assert not (waits and room > 0 and own > 0)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(0, 30_000)),
        st.tuples(st.just("grant"), st.integers(0, 9), st.integers(1, 40_000)),
        st.tuples(st.just("grant_all"), st.integers(1, 60_000)),
        st.tuples(st.just("window"), st.integers(0, 70_000)),
        st.tuples(st.just("drop"), st.integers(0, 9)),
    ),
    max_size=30,
)


def _step(wire: Wire, model: Model, kind: str, *arguments: int) -> None:
    before = {key: wire.size(key) for key in model.bodies}
    if kind == "send":
        stream_id = 2 * len(model.bodies) + 1
        body = bytes(index % 251 for index in range(arguments[0]))
        model.windows[stream_id] = model.initial
        model.bodies[stream_id] = (wire.box.send(stream_id, body), body)
    elif kind == "grant_all":
        model.connection += arguments[0]
        wire.box.grant(None, arguments[0])
    elif kind == "window":
        for stream_id in model.windows:
            model.windows[stream_id] += arguments[0] - model.initial
        model.initial = arguments[0]
        wire.box.set_stream_window(arguments[0])
    elif (stream_id := 2 * arguments[0] + 1) in model.bodies:
        outgoing, _ = model.bodies[stream_id]
        if kind == "grant":
            model.windows[stream_id] += arguments[1]
            wire.box.grant(outgoing, arguments[1])
        else:
            outgoing.drop()
    for key, size in before.items():  # only what has room grew
        assert wire.size(key) == size or wire.size(key) <= model.windows[key]
        assert wire.size(key) == size or not model.bodies[key][0].dropped


@given(STEPS)
def test_whatever_the_peer_says_no_window_is_overrun_and_none_is_left_unused(steps):
    """Each body arrives in order, and ends once, with its last byte."""
    wire, model = Wire(), Model()
    for step in steps:
        _step(wire, model, *step)
        model.check(wire)
    wire.box.grant(None, 2_000_000)
    model.connection += 2_000_000
    for stream_id, (outgoing, body) in model.bodies.items():
        model.windows[stream_id] += 500_000
        wire.box.grant(outgoing, 500_000)
        assert outgoing.dropped or wire.size(stream_id) == len(body)
    model.check(wire)
