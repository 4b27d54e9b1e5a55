"""`SingleFlight`: each text is computed at most once at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from libs.errors import ResourceExhausted, Unavailable
from services.embedding_cache.domain import Vector
from services.embedding_cache.single_flight import SingleFlight


class _FakeEngine:
    """Computes once `gate` is set; records the texts of each batch."""

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


class _Store(dict[bytes, Vector]):
    def put(self, key: bytes, vector: Vector) -> None:
        self[key] = vector


def _single_flight(stored: _Store | None = None, *, limit_texts: int = 100) -> SingleFlight:
    store = stored if stored is not None else _Store()
    return SingleFlight(store=store.put, limit_texts=limit_texts)


async def test_identical_concurrent_texts_are_computed_once():
    """Overlapping requests share the texts they have in common and compute only the rest."""
    engine, stored = _FakeEngine(), _Store()
    single_flight = _single_flight(stored)
    one = asyncio.create_task(single_flight.fetch(_keyed("a", "b"), engine.compute))
    two = asyncio.create_task(single_flight.fetch(_keyed("b", "c"), engine.compute))
    three = asyncio.create_task(single_flight.fetch(_keyed("c", "a"), engine.compute))
    await _settle()
    assert engine.batches == [["a", "b"], ["c"]]
    assert b"a" in single_flight
    engine.gate.set()
    for task, texts in ((one, "ab"), (two, "bc"), (three, "ca")):
        vectors = await task
        assert all(vectors[text.encode()] == _vector(text) for text in texts)
    assert set(stored) == {b"a", b"b", b"c"}
    assert b"a" not in single_flight


async def test_cancelling_the_first_request_does_not_affect_those_that_joined():
    """The computation continues for the requests that joined it."""
    engine, stored = _FakeEngine(), _Store()
    single_flight = _single_flight(stored)
    first_request = asyncio.create_task(single_flight.fetch(_keyed("a"), engine.compute))
    joined = asyncio.create_task(single_flight.fetch(_keyed("a"), engine.compute))
    await _settle()
    first_request.cancel()
    await _settle()
    assert first_request.cancelled()
    engine.gate.set()
    assert (await joined)[b"a"] == _vector("a")
    assert engine.batches == [["a"]]
    assert engine.cancelled == 0
    assert set(stored) == {b"a"}


async def test_cancelling_a_joined_request_does_not_affect_the_first():
    """The computation continues for the request that started it."""
    engine = _FakeEngine()
    single_flight = _single_flight()
    first_request = asyncio.create_task(single_flight.fetch(_keyed("a"), engine.compute))
    joined = asyncio.create_task(single_flight.fetch(_keyed("a"), engine.compute))
    await _settle()
    joined.cancel()
    await _settle()
    engine.gate.set()
    assert (await first_request)[b"a"] == _vector("a")
    assert engine.cancelled == 0


async def test_a_computation_without_waiters_is_cancelled_and_restarted():
    """The next request does not join the computation that is being cancelled."""
    engine, stored = _FakeEngine(), _Store()
    single_flight = _single_flight(stored)
    cancelled = [
        asyncio.create_task(single_flight.fetch(_keyed("a"), engine.compute)) for _ in range(2)
    ]
    await _settle()
    for task in cancelled:
        task.cancel()
    await asyncio.wait(cancelled)
    next_request = asyncio.create_task(single_flight.fetch(_keyed("a"), engine.compute))
    await _settle()
    assert engine.cancelled == 1
    assert engine.batches == [["a"], ["a"]]
    engine.gate.set()
    assert (await next_request)[b"a"] == _vector("a")
    assert set(stored) == {b"a"}
    assert b"a" not in single_flight


async def test_a_computation_cancelled_before_its_first_step_leaves_no_entry():
    """A request that is cancelled at once does not block later requests."""
    engine = _FakeEngine()
    engine.gate.set()
    single_flight = _single_flight()
    cancelled = asyncio.create_task(single_flight.fetch(_keyed("a"), engine.compute))
    await asyncio.sleep(0)  # the task of the batch exists, and has not run yet
    cancelled.cancel()
    await asyncio.wait([cancelled])
    assert b"a" not in single_flight
    assert (await single_flight.fetch(_keyed("a"), engine.compute))[b"a"] == _vector("a")


async def test_a_failure_reaches_all_waiters_and_is_not_stored():
    """The next request computes the text again."""
    engine, stored = _FakeEngine(), _Store()
    single_flight = _single_flight(stored)
    engine.error = Unavailable("dead", reason="BACKEND_FAILED")
    tasks = [
        asyncio.create_task(single_flight.fetch(_keyed("a"), engine.compute)) for _ in range(3)
    ]
    await _settle()
    engine.gate.set()
    for task in tasks:
        with pytest.raises(Unavailable, match="dead"):
            await task
    assert len(engine.batches) == 1
    assert not stored
    engine.error = None
    assert (await single_flight.fetch(_keyed("a"), engine.compute))[b"a"] == _vector("a")


async def test_a_failure_ends_the_request_at_once_and_cancels_its_other_batch():
    """A request that waits for two computations fails with the first failure."""
    first_engine, second_engine = _FakeEngine(), _FakeEngine()
    single_flight = _single_flight()
    first_request = asyncio.create_task(single_flight.fetch(_keyed("a"), first_engine.compute))
    await _settle()
    both = asyncio.create_task(single_flight.fetch(_keyed("a", "b"), second_engine.compute))
    await _settle()
    first_engine.error = Unavailable("dead", reason="BACKEND_FAILED")
    first_engine.gate.set()
    for task in (first_request, both):
        with pytest.raises(Unavailable):
            await task
    await _settle()
    assert second_engine.cancelled == 1
    assert b"b" not in single_flight


async def test_a_cancelled_computation_is_an_error_of_its_waiters():
    """Waiters get a retryable error, not a cancellation that they did not request."""

    async def compute(_texts: Sequence[str]) -> Sequence[Vector]:
        raise asyncio.CancelledError

    with pytest.raises(Unavailable) as caught:
        await _single_flight().fetch(_keyed("a"), compute)
    assert caught.value.retry_after_seconds is not None


async def test_too_many_texts_at_a_time_are_refused():
    """The limit applies to new texts; joining is always possible."""
    engine = _FakeEngine()
    single_flight = _single_flight(limit_texts=2)
    first_request = asyncio.create_task(single_flight.fetch(_keyed("a", "b"), engine.compute))
    await _settle()
    with pytest.raises(ResourceExhausted) as caught:
        await single_flight.fetch(_keyed("c"), engine.compute)
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.metadata["limit"] == "2"
    joined = asyncio.create_task(single_flight.fetch(_keyed("b"), engine.compute))
    await _settle()
    engine.gate.set()
    assert (await joined)[b"b"] == _vector("b")
    await first_request
    assert (await single_flight.fetch(_keyed("c"), engine.compute))[b"c"] == _vector("c")
