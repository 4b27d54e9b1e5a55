"""The buffer between an engine and a reader."""

from __future__ import annotations

import asyncio

import pytest

from libs.errors import InvalidArgument
from services.inference.domain import Ending, Piece
from services.inference.relay import MAX_WAITING_PIECES, Behind, Relay


async def test_a_fast_reader_gets_every_piece_on_its_own():
    """What is taken before the next piece comes is not held back to be joined."""
    relay = Relay()
    for text in ("a", "b"):
        relay.put(Piece(text, (1,), 1))
        assert await relay.take() == Piece(text, (1,), 1)


async def test_a_slow_reader_gets_what_has_queued_in_one():
    """Text, ids and counts of joined pieces add up, and the ending stays."""
    relay = Relay()
    ending = Ending("stop", 3, 3, 0)
    relay.put(Piece("a", (1,), 1))
    relay.put(Piece("b", (2,), 2))
    relay.put(Piece("", (), 0, ending))
    relay.close()
    assert await relay.take() == Piece("ab", (1, 2), 3, ending)
    assert await relay.take() is None


async def test_a_full_buffer_holds_the_engine_until_the_reader_takes():
    """The engine is slowed, memory does not grow."""
    relay = Relay()
    for _ in range(MAX_WAITING_PIECES):
        relay.put(Piece("x", (1,), 1))
    waiting = asyncio.create_task(relay.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    await relay.take()
    await asyncio.wait_for(waiting, 1)


async def test_pieces_put_before_the_close_are_not_lost():
    """Closing ends the stream behind what is there."""
    relay = Relay()
    relay.put(Piece("a", (1,), 1))
    relay.close()
    assert (await relay.take()) is not None
    assert (await relay.take()) is None


async def test_what_the_reader_has_is_not_sent_again():
    """Tokens of before are counted away, piece by piece, wherever they are cut."""
    relay = Relay()
    behind = Behind(relay, token_count=3)
    for piece in (Piece("a", (1,), 1), Piece("bc", (2, 3), 2), Piece("d", (4,), 1)):
        behind.put(piece)
    taken = await relay.take()
    assert taken is not None
    assert (taken.text, taken.token_count) == ("d", 1)


async def test_a_count_that_no_message_ended_at_is_refused():
    """Half a piece cannot be sent."""
    with pytest.raises(InvalidArgument):
        Behind(Relay(), token_count=1).put(Piece("bc", (2, 3), 2))
