"""Frames as bytes: written, cut apart and read again."""

from __future__ import annotations

import struct
from itertools import pairwise

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.http2 import frames
from libs.http2.frames import (
    ErrorCode,
    Frame,
    FrameReader,
    FrameType,
    ProtocolViolationError,
    Setting,
)

BYTE = st.integers(0, 255)
STREAM = st.integers(0, frames.MAX_STREAM_ID)
FRAME = st.builds(Frame, BYTE, BYTE, STREAM, st.binary(max_size=300))
FLAGS = {"padded": 0x8, "priority": 0x20}


def written(frame: Frame, *, reserved_bit: bool = False) -> bytes:
    """Writes a frame as RFC 9113, 4.1 draws it."""
    length = len(frame.payload).to_bytes(3, "big")
    stream_id = frame.stream_id | (reserved_bit << 31)
    return length + bytes((frame.type, frame.flags)) + struct.pack(">I", stream_id) + frame.payload


def read(*parts: bytes) -> list[Frame]:
    reader = FrameReader()
    return [frame for part in parts for frame in reader.feed(part)]


@given(st.lists(FRAME, max_size=8), st.lists(st.floats(0, 1), max_size=12))
def test_the_same_frames_come_out_whatever_the_cuts(made, cuts):
    """A read of a socket ends anywhere."""
    data = b"".join(map(written, made))
    at = [0, *sorted(int(cut * len(data)) for cut in cuts), len(data)]
    assert read(*(data[start:end] for start, end in pairwise(at))) == made


def test_a_frame_comes_out_as_soon_as_its_last_byte_is_there():
    """Not only with the next one."""
    data = written(Frame(0, 1, 3, b"abc"))
    reader = FrameReader()
    for byte in data[:-1]:
        assert not list(reader.feed(bytes((byte,))))
    assert list(reader.feed(data[-1:])) == [Frame(0, 1, 3, b"abc")]


def test_the_reserved_bit_of_a_stream_is_ignored():
    """A receiver must not look at it."""
    assert read(written(Frame(0, 0, 5, b"x"), reserved_bit=True)) == [Frame(0, 0, 5, b"x")]


def test_a_frame_may_be_as_long_as_was_allowed_and_no_longer():
    """It is refused by its head, before its payload is taken into memory; those before it count."""
    longest = Frame(0, 0, 1, bytes(16_384))
    assert read(written(longest)) == [longest]
    feeding = FrameReader().feed(written(longest) + b"\x00\x40\x01" + bytes(6))
    assert next(feeding) == longest
    with pytest.raises(ProtocolViolationError) as caught:
        next(feeding)
    assert caught.value.code == ErrorCode.FRAME_SIZE_ERROR


@given(st.binary(max_size=300), st.none() | BYTE, st.booleans())
def test_what_is_carried_is_found_between_padding_and_priority(data, padding, has_priority):
    """DATA knows no priority: there the same flag means nothing."""
    flags = (padding is not None) * FLAGS["padded"] | has_priority * FLAGS["priority"]
    before, after = (b"", b"") if padding is None else (bytes((padding,)), bytes(padding))
    assert frames.content(Frame(FrameType.DATA, flags, 1, before + data + after)) == data
    middle = b"prior" if has_priority else b""
    headers = Frame(FrameType.HEADERS, flags, 1, before + middle + data + after)
    assert frames.content(headers) == data


@pytest.mark.parametrize(
    ("kind", "flags", "payload"),
    [
        (FrameType.DATA, FLAGS["padded"], b""),
        (FrameType.DATA, FLAGS["padded"], b"\x01"),
        (FrameType.DATA, FLAGS["padded"], b"\x04abc"),
        (FrameType.HEADERS, FLAGS["priority"], b"1234"),
        (FrameType.HEADERS, FLAGS["padded"] | FLAGS["priority"], b"\x0112345"),
    ],
)
def test_padding_that_leaves_no_room_is_a_violation(kind, flags, payload):
    """It would be cut from what comes before it."""
    with pytest.raises(ProtocolViolationError):
        frames.content(Frame(kind, flags, 1, payload))


@pytest.mark.parametrize("size", [0, 1, 16_384, 16_385, 32_768, 32_769, 50_000])
def test_long_headers_go_on_in_further_frames(size):
    """Only the last says that the block is whole, and none ends the stream."""
    block = bytes(index % 251 for index in range(size))
    made = read(frames.headers(7, block))
    assert [frame.type for frame in made] == [0x1] + [0x9] * (len(made) - 1)
    assert [frame.flags for frame in made] == [0] * (len(made) - 1) + [0x4]
    assert {frame.stream_id for frame in made} == {7}
    assert len(made) == max(1, -(-size // 16_384))
    assert b"".join(frame.payload for frame in made) == block


@pytest.mark.parametrize("size", [0, 1, 126, 127, 128, 129, 254, 255, 256, 16_510, 16_511, 40_000])
def test_a_field_of_any_length_is_decoded_to_the_same(size):
    """Lengths from 127 on take more bytes than one."""
    block = frames.literal("n" * max(1, size // 2), "v" * size)
    assert hpack.Decoder().decode(block) == [("n" * max(1, size // 2), "v" * size)]


ASCII = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=300)


@given(st.lists(st.tuples(ASCII.filter(bool), ASCII), max_size=5))
def test_joined_fields_are_decoded_in_order_and_enter_no_table(fields):
    """So blocks can be kept, and joined to others, on any connection."""
    decoder = hpack.Decoder()
    block = b"".join(frames.literal(name, value) for name, value in fields)
    assert decoder.decode(block) == fields
    assert not decoder.header_table.dynamic_entries


@pytest.mark.parametrize(("name", "value"), [("näme", "v"), ("n", "wärt")])
def test_a_field_that_is_not_ascii_is_refused(name, value):
    """HTTP has no letters for it."""
    with pytest.raises(UnicodeEncodeError):
        frames.literal(name, value)


def test_frames_of_a_client_are_as_the_rfc_writes_them():
    """Byte for byte."""
    assert frames.window_update(5, 70_000) == bytes.fromhex("000004 08 00 00000005 00011170")
    assert frames.rst_stream(3, ErrorCode.CANCEL) == bytes.fromhex("000004 03 00 00000003 00000008")
    assert frames.goaway(ErrorCode.PROTOCOL_ERROR) == bytes.fromhex(
        "000008 07 00 00000000 00000000 00000001"
    )
    assert frames.settings({Setting.ENABLE_PUSH: 0}) == bytes.fromhex(
        "000006 04 00 00000000 0002 00000000"
    )
    payload = bytes(70_000)  # a peer may allow more than 16 bits can say
    assert frames.frame(FrameType.DATA, 1, 9, payload)[:9] == bytes.fromhex("011170 00 01 00000009")


@given(st.dictionaries(st.sampled_from(Setting), st.integers(0, 2**32 - 1)))
def test_settings_are_read_as_written(pairs):
    """In their order, which counts."""
    (frame,) = read(frames.settings(pairs))
    assert frames.read_settings(frame.payload) == list(pairs.items())


@pytest.mark.parametrize("size", [1, 5, 7])
def test_half_a_setting_is_a_violation(size):
    """The RFC names its code."""
    with pytest.raises(ProtocolViolationError) as caught:
        frames.read_settings(bytes(size))
    assert caught.value.code == ErrorCode.FRAME_SIZE_ERROR


def test_numbers_have_31_bits_and_must_be_whole():
    """The first bit is reserved."""
    assert frames.number(b"\xff\xff\xff\xff") == 2**31 - 1
    assert frames.number(b"\x00\x00\x00\x00\x80\x00\x00\x05", 4) == 5
    for payload, at in ((b"abc", 0), (bytes(7), 4)):
        with pytest.raises(ProtocolViolationError):
            frames.number(payload, at)


def test_errors_are_called_by_their_names():
    """Those that nobody has named, by their numbers."""
    assert frames.error_name(0xB) == "ENHANCE_YOUR_CALM"
    assert frames.error_name(0xEE) == "code 238"
