"""The buffer between an engine and a reader."""

from __future__ import annotations

import asyncio

import pytest

from libs.errors import InvalidArgument, ResourceExhausted
from services.inference.domain import Chunk, Finish
from services.inference.generation.relay import (
    MAX_WAITING_CHUNKS,
    Relay,
    RelayLimits,
    SkipDelivered,
)


async def test_a_fast_reader_gets_every_chunk_on_its_own():
    """A chunk that is taken before the next one comes is not held back."""
    relay = Relay()
    for text in ("a", "b"):
        relay.put(Chunk(text, (1,), 1))
        assert await relay.take() == Chunk(text, (1,), 1)


async def test_a_slow_reader_gets_waiting_chunks_merged():
    """Text, ids and counts add up, and the finish stays."""
    relay = Relay()
    finish = Finish("stop", 3, 3, 0)
    relay.put(Chunk("a", (1,), 1))
    relay.put(Chunk("b", (2,), 2))
    relay.put(Chunk("", (), 0, finish))
    relay.close()
    assert await relay.take() == Chunk("ab", (1, 2), 3, finish)
    assert await relay.take() is None


# Longer than any test: waiting for it is waiting forever.
NEVER_SECONDS = 1000.0


async def lagging(limits: RelayLimits) -> Relay:
    """Returns a relay whose reader took a chunk a moment ago and comes back to two."""
    relay = Relay(limits)
    relay.put(Chunk("0", (0,), 1))
    await relay.take()
    for text in ("a", "b"):
        relay.put(Chunk(text, (1,), 1))
    return relay


async def test_chunks_are_held_for_a_lagging_reader():
    """Chunks that come within the delay are merged with them."""
    relay = await lagging(RelayLimits(max_delay_seconds=NEVER_SECONDS))
    taking = asyncio.create_task(relay.take())
    for text in ("c", "d"):
        await asyncio.sleep(0.01)
        assert not taking.done()
        relay.put(Chunk(text, (3,), 1))
    relay.close()
    taken = await taking
    assert taken is not None
    assert taken.text == "abcd"


async def test_holding_ends_with_the_delay():
    """A reader that is back before the second chunk gets the next one at once."""
    relay = await lagging(RelayLimits(max_delay_seconds=0.02))
    async with asyncio.timeout(5):
        assert (await relay.take()) == Chunk("ab", (1, 1), 2)
        relay.put(Chunk("c", (3,), 1))
        assert await relay.take() == Chunk("c", (3,), 1)


async def test_holding_ends_when_the_buffer_is_full_or_closed():
    """The delay slows neither the engine nor the end of an answer."""
    limits = RelayLimits(max_delay_seconds=NEVER_SECONDS)
    full, closed = await lagging(limits), await lagging(limits)
    takings = [asyncio.create_task(relay.take()) for relay in (full, closed)]
    await asyncio.sleep(0)
    for _ in range(MAX_WAITING_CHUNKS - 2):
        full.put(Chunk("x", (1,), 1))
    closed.close()
    async with asyncio.timeout(5):
        whole, rest = await asyncio.gather(*takings)
    assert whole is not None
    assert whole.token_count == MAX_WAITING_CHUNKS
    assert rest is not None
    assert rest.text == "ab"


async def test_without_a_delay_nothing_is_held():
    """Each take returns what is there."""
    relay = Relay(RelayLimits(max_delay_seconds=0))
    for texts in ("ab", "cd"):
        for text in texts:
            relay.put(Chunk(text, (1,), 1))
        taken = await relay.take()
        assert taken is not None
        assert taken.text == texts


async def test_a_reader_that_is_too_slow_ends_the_answer():
    """The engine's side raises at its next chunk; the buffer can still be read."""
    relay = Relay(RelayLimits(slow_reader_seconds=0.05))
    for _ in range(MAX_WAITING_CHUNKS):
        relay.put(Chunk("x", (1,), 1))
    with pytest.raises(ResourceExhausted) as raised:
        await relay.room()
    assert raised.value.reason == "READER_TOO_SLOW"
    assert raised.value.metadata == {"limit_seconds": "0.05"}
    taken = await relay.take()
    assert taken is not None
    assert taken.token_count == MAX_WAITING_CHUNKS


async def test_a_full_buffer_blocks_the_engine_until_the_reader_takes():
    """The engine is slowed, memory does not grow."""
    relay = Relay()
    for _ in range(MAX_WAITING_CHUNKS):
        relay.put(Chunk("x", (1,), 1))
    waiting = asyncio.create_task(relay.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    await relay.take()
    await asyncio.wait_for(waiting, 1)


async def test_chunks_before_the_close_are_not_lost():
    """Closing ends the stream after what is there."""
    relay = Relay()
    relay.put(Chunk("a", (1,), 1))
    relay.close()
    assert (await relay.take()) is not None
    assert (await relay.take()) is None


async def test_tokens_that_the_client_has_are_not_sent_again():
    """They are dropped chunk by chunk, wherever chunks were cut."""
    relay = Relay()
    skipping = SkipDelivered(relay, token_count=3)
    for chunk in (Chunk("a", (1,), 1), Chunk("bc", (2, 3), 2), Chunk("d", (4,), 1)):
        skipping.put(chunk)
    taken = await relay.take()
    assert taken is not None
    assert (taken.text, taken.token_count) == ("d", 1)


async def test_a_position_inside_a_chunk_is_refused():
    """Half a chunk cannot be sent."""
    with pytest.raises(InvalidArgument):
        SkipDelivered(Relay(), token_count=1).put(Chunk("bc", (2, 3), 2))
