"""The promises of shared computations."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from libs.errors import ResourceExhausted, Unavailable
from services.embedding_cache.domain import Vector
from services.embedding_cache.single_flight import SingleFlight


class _Engine:
    """Computes when told to; says what it was asked for."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.cancelled = 0
        self.gate = asyncio.Event()
        self.error: Exception | None = None

    async def compute(self, texts: Sequence[str]) -> Sequence[Vector]:
        self.batches.append(list(texts))
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return [_vector(text) for text in texts]


def _vector(text: str) -> Vector:
    return Vector(text.encode(), len(text))


def _keyed(*texts: str) -> dict[bytes, str]:
    return {text.encode(): text for text in texts}


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class _Kept(dict[bytes, Vector]):
    def keep(self, key: bytes, vector: Vector) -> None:
        self[key] = vector


def _flights(kept: _Kept | None = None, *, limit_texts: int = 100) -> SingleFlight:
    return SingleFlight(keep=(kept if kept is not None else _Kept()).keep, limit_texts=limit_texts)


async def test_identical_concurrent_texts_are_computed_once():
    """Requests that overlap share what they have in common and compute only the rest."""
    engine, kept = _Engine(), _Kept()
    flights = _flights(kept)
    one = asyncio.create_task(flights.fetch(_keyed("a", "b"), engine.compute))
    two = asyncio.create_task(flights.fetch(_keyed("b", "c"), engine.compute))
    three = asyncio.create_task(flights.fetch(_keyed("c", "a"), engine.compute))
    await _settle()
    assert engine.batches == [["a", "b"], ["c"]]
    assert b"a" in flights
    engine.gate.set()
    for task, wanted in ((one, "ab"), (two, "bc"), (three, "ca")):
        vectors = await task
        assert all(vectors[text.encode()] == _vector(text) for text in wanted)
    assert set(kept) == {b"a", b"b", b"c"}
    assert b"a" not in flights


async def test_a_cancelled_leader_leaves_its_followers_unharmed():
    """Who began a computation may leave; who joined it gets its vectors from that computation."""
    engine, kept = _Engine(), _Kept()
    flights = _flights(kept)
    leader = asyncio.create_task(flights.fetch(_keyed("a"), engine.compute))
    follower = asyncio.create_task(flights.fetch(_keyed("a"), engine.compute))
    await _settle()
    leader.cancel()
    await _settle()
    assert leader.cancelled()
    engine.gate.set()
    assert (await follower)[b"a"] == _vector("a")
    assert engine.batches == [["a"]]
    assert engine.cancelled == 0
    assert set(kept) == {b"a"}


async def test_a_cancelled_follower_leaves_the_leader_unharmed():
    """Who joined a computation may leave it."""
    engine = _Engine()
    flights = _flights()
    leader = asyncio.create_task(flights.fetch(_keyed("a"), engine.compute))
    follower = asyncio.create_task(flights.fetch(_keyed("a"), engine.compute))
    await _settle()
    follower.cancel()
    await _settle()
    engine.gate.set()
    assert (await leader)[b"a"] == _vector("a")
    assert engine.cancelled == 0


async def test_what_nobody_waits_for_is_stopped_and_begun_anew():
    """When all have left, the engine is freed, and the next request does not join what is dying."""
    engine, kept = _Engine(), _Kept()
    flights = _flights(kept)
    gone = [asyncio.create_task(flights.fetch(_keyed("a"), engine.compute)) for _ in range(2)]
    await _settle()
    for task in gone:
        task.cancel()
    await asyncio.wait(gone)
    fresh = asyncio.create_task(flights.fetch(_keyed("a"), engine.compute))
    await _settle()
    assert engine.cancelled == 1
    assert engine.batches == [["a"], ["a"]]
    engine.gate.set()
    assert (await fresh)[b"a"] == _vector("a")
    assert set(kept) == {b"a"}
    assert b"a" not in flights


async def test_cancelled_before_it_began_a_computation_leaves_nothing_behind():
    """A request that dies in the step after it was made strands nobody."""
    engine = _Engine()
    engine.gate.set()
    flights = _flights()
    gone = asyncio.create_task(flights.fetch(_keyed("a"), engine.compute))
    await asyncio.sleep(0)  # the flight's task exists, and has not run yet
    gone.cancel()
    await asyncio.wait([gone])
    assert b"a" not in flights
    assert (await flights.fetch(_keyed("a"), engine.compute))[b"a"] == _vector("a")


async def test_a_failure_reaches_all_who_wait_and_is_not_kept():
    """Everybody learns of it, and whoever asks next has it computed again."""
    engine, kept = _Engine(), _Kept()
    flights = _flights(kept)
    engine.error = Unavailable("dead", reason="BACKEND_FAILED")
    tasks = [asyncio.create_task(flights.fetch(_keyed("a"), engine.compute)) for _ in range(3)]
    await _settle()
    engine.gate.set()
    for task in tasks:
        with pytest.raises(Unavailable, match="dead"):
            await task
    assert len(engine.batches) == 1
    assert not kept
    engine.error = None
    assert (await flights.fetch(_keyed("a"), engine.compute))[b"a"] == _vector("a")


async def test_a_failure_is_told_at_once_and_frees_the_rest():
    """Who waits for two computations fails with the first, and its other one is stopped."""
    first, second = _Engine(), _Engine()
    flights = _flights()
    leader = asyncio.create_task(flights.fetch(_keyed("a"), first.compute))
    await _settle()
    both = asyncio.create_task(flights.fetch(_keyed("a", "b"), second.compute))
    await _settle()
    first.error = Unavailable("dead", reason="BACKEND_FAILED")
    first.gate.set()
    for task in (leader, both):
        with pytest.raises(Unavailable):
            await task
    await _settle()
    assert second.cancelled == 1
    assert b"b" not in flights


async def test_a_computation_that_is_killed_is_an_error_and_no_cancellation():
    """Who waits did not cancel anything, and is told what it can do: try again."""

    async def compute(_texts: Sequence[str]) -> Sequence[Vector]:
        raise asyncio.CancelledError

    with pytest.raises(Unavailable) as caught:
        await _flights().fetch(_keyed("a"), compute)
    assert caught.value.retry_after_seconds is not None


async def test_too_many_texts_at_a_time_are_refused():
    """The limit holds for what is new; to join costs nothing."""
    engine = _Engine()
    flights = _flights(limit_texts=2)
    leader = asyncio.create_task(flights.fetch(_keyed("a", "b"), engine.compute))
    await _settle()
    with pytest.raises(ResourceExhausted) as caught:
        await flights.fetch(_keyed("c"), engine.compute)
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.metadata["limit"] == "2"
    joiner = asyncio.create_task(flights.fetch(_keyed("b"), engine.compute))
    await _settle()
    engine.gate.set()
    assert (await joiner)[b"b"] == _vector("b")
    await leader
    assert (await flights.fetch(_keyed("c"), engine.compute))[b"c"] == _vector("c")
