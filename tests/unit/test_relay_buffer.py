"""The buffer between an engine and a reader."""

from __future__ import annotations

import asyncio

import pytest

from libs.errors import InvalidArgument, ResourceExhausted
from services.inference.domain import Chunk, Finish
from services.inference.generation.relay import (
    MAX_WAITING_PIECES,
    Relay,
    RelayLimits,
    SkipDelivered,
)


async def test_a_fast_reader_gets_every_piece_on_its_own():
    """What is taken before the next piece comes is not held back to be joined."""
    relay = Relay()
    for text in ("a", "b"):
        relay.put(Chunk(text, (1,), 1))
        assert await relay.take() == Chunk(text, (1,), 1)


async def test_a_slow_reader_gets_what_has_queued_in_one():
    """Text, ids and counts of joined pieces add up, and the ending stays."""
    relay = Relay()
    ending = Finish("stop", 3, 3, 0)
    relay.put(Chunk("a", (1,), 1))
    relay.put(Chunk("b", (2,), 2))
    relay.put(Chunk("", (), 0, ending))
    relay.close()
    assert await relay.take() == Chunk("ab", (1, 2), 3, ending)
    assert await relay.take() is None


# Longer than any test lasts: whoever waits for it waits for ever.
NEVER_SECONDS = 1000.0


async def behind(limits: RelayLimits) -> Relay:
    """A relay whose reader took a piece a moment ago and comes back to two."""
    relay = Relay(limits)
    relay.put(Chunk("0", (0,), 1))
    await relay.take()
    for text in ("a", "b"):
        relay.put(Chunk(text, (1,), 1))
    return relay


async def test_what_a_lagging_reader_comes_back_to_is_gathered_for_a_moment():
    """More that comes within the delay goes out with it."""
    relay = await behind(RelayLimits(max_delay_seconds=NEVER_SECONDS))
    taking = asyncio.create_task(relay.take())
    for text in ("c", "d"):
        await asyncio.sleep(0.01)
        assert not taking.done()
        relay.put(Chunk(text, (3,), 1))
    relay.close()
    taken = await taking
    assert taken is not None
    assert taken.text == "abcd"


async def test_gathering_ends_when_the_delay_is_over():
    """A reader that is back before the second piece gets the next one at once."""
    relay = await behind(RelayLimits(max_delay_seconds=0.02))
    async with asyncio.timeout(5):
        assert (await relay.take()) == Chunk("ab", (1, 1), 2)
        relay.put(Chunk("c", (3,), 1))
        assert await relay.take() == Chunk("c", (3,), 1)


async def test_gathering_ends_when_the_buffer_is_full_or_nothing_more_comes():
    """A delay must neither slow the engine nor the end of an answer."""
    limits = RelayLimits(max_delay_seconds=NEVER_SECONDS)
    full, closed = await behind(limits), await behind(limits)
    takings = [asyncio.create_task(relay.take()) for relay in (full, closed)]
    await asyncio.sleep(0)
    for _ in range(MAX_WAITING_PIECES - 2):
        full.put(Chunk("x", (1,), 1))
    closed.close()
    async with asyncio.timeout(5):
        whole, rest = await asyncio.gather(*takings)
    assert whole is not None
    assert whole.token_count == MAX_WAITING_PIECES
    assert rest is not None
    assert rest.text == "ab"


async def test_without_a_delay_nothing_is_gathered():
    """Each take returns what there is."""
    relay = Relay(RelayLimits(max_delay_seconds=0))
    for texts in ("ab", "cd"):
        for text in texts:
            relay.put(Chunk(text, (1,), 1))
        taken = await relay.take()
        assert taken is not None
        assert taken.text == texts


async def test_a_reader_that_takes_nothing_for_too_long_ends_the_answer():
    """The engine is told at its next piece; what is in the buffer can still be read."""
    relay = Relay(RelayLimits(slow_reader_seconds=0.05))
    for _ in range(MAX_WAITING_PIECES):
        relay.put(Chunk("x", (1,), 1))
    with pytest.raises(ResourceExhausted) as raised:
        await relay.room()
    assert raised.value.reason == "READER_TOO_SLOW"
    assert raised.value.metadata == {"limit_seconds": "0.05"}
    taken = await relay.take()
    assert taken is not None
    assert taken.token_count == MAX_WAITING_PIECES


async def test_a_full_buffer_holds_the_engine_until_the_reader_takes():
    """The engine is slowed, memory does not grow."""
    relay = Relay()
    for _ in range(MAX_WAITING_PIECES):
        relay.put(Chunk("x", (1,), 1))
    waiting = asyncio.create_task(relay.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    await relay.take()
    await asyncio.wait_for(waiting, 1)


async def test_pieces_put_before_the_close_are_not_lost():
    """Closing ends the stream behind what is there."""
    relay = Relay()
    relay.put(Chunk("a", (1,), 1))
    relay.close()
    assert (await relay.take()) is not None
    assert (await relay.take()) is None


async def test_what_the_reader_has_is_not_sent_again():
    """Tokens of before are counted away, piece by piece, wherever they are cut."""
    relay = Relay()
    behind = SkipDelivered(relay, token_count=3)
    for piece in (Chunk("a", (1,), 1), Chunk("bc", (2, 3), 2), Chunk("d", (4,), 1)):
        behind.put(piece)
    taken = await relay.take()
    assert taken is not None
    assert (taken.text, taken.token_count) == ("d", 1)


async def test_a_count_that_no_message_ended_at_is_refused():
    """Half a piece cannot be sent."""
    with pytest.raises(InvalidArgument):
        SkipDelivered(Relay(), token_count=1).put(Chunk("bc", (2, 3), 2))
