"""`SingleFlight`: each text is computed at most once at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from libs.errors import ResourceExhausted, Unavailable
from services.embedding_cache.domain import Caller, Vector
from services.embedding_cache.single_flight import TEXTS_PER_CALL, Compute, SingleFlight, Unpaid

ACME = Caller("acme", "acme")


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


async def _fetch(
    single_flight: SingleFlight,
    texts: Mapping[bytes, str],
    compute: Compute,
    *,
    caller: Caller = ACME,
    unpaid: Unpaid = lambda _: None,
) -> Mapping[bytes, Vector]:
    return await single_flight.fetch(texts, compute, caller=caller, unpaid=unpaid)


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class _Store(dict[bytes, Vector]):
    def put(self, _owner: str, key: bytes, vector: Vector) -> None:
        self[key] = vector


def _single_flight(stored: _Store | None = None, *, limit_texts: int = 100) -> SingleFlight:
    store = stored if stored is not None else _Store()
    return SingleFlight(store=store.put, limit_texts=limit_texts)


async def test_identical_concurrent_texts_are_computed_once():
    """Overlapping requests share the texts they have in common and compute only the rest."""
    engine, stored = _FakeEngine(), _Store()
    single_flight = _single_flight(stored)
    one = asyncio.create_task(_fetch(single_flight, _keyed("a", "b"), engine.compute))
    two = asyncio.create_task(_fetch(single_flight, _keyed("b", "c"), engine.compute))
    three = asyncio.create_task(_fetch(single_flight, _keyed("c", "a"), engine.compute))
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
    first_request = asyncio.create_task(_fetch(single_flight, _keyed("a"), engine.compute))
    joined = asyncio.create_task(_fetch(single_flight, _keyed("a"), engine.compute))
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
    first_request = asyncio.create_task(_fetch(single_flight, _keyed("a"), engine.compute))
    joined = asyncio.create_task(_fetch(single_flight, _keyed("a"), engine.compute))
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
        asyncio.create_task(_fetch(single_flight, _keyed("a"), engine.compute)) for _ in range(2)
    ]
    await _settle()
    for task in cancelled:
        task.cancel()
    await asyncio.wait(cancelled)
    next_request = asyncio.create_task(_fetch(single_flight, _keyed("a"), engine.compute))
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
    cancelled = asyncio.create_task(_fetch(single_flight, _keyed("a"), engine.compute))
    await asyncio.sleep(0)  # the task of the batch exists, and has not run yet
    cancelled.cancel()
    await asyncio.wait([cancelled])
    assert b"a" not in single_flight
    assert (await _fetch(single_flight, _keyed("a"), engine.compute))[b"a"] == _vector("a")


async def test_a_failure_reaches_all_waiters_and_is_not_stored():
    """The next request computes the text again."""
    engine, stored = _FakeEngine(), _Store()
    single_flight = _single_flight(stored)
    engine.error = Unavailable("dead", reason="BACKEND_FAILED")
    tasks = [
        asyncio.create_task(_fetch(single_flight, _keyed("a"), engine.compute)) for _ in range(3)
    ]
    await _settle()
    engine.gate.set()
    for task in tasks:
        with pytest.raises(Unavailable, match="dead"):
            await task
    assert len(engine.batches) == 1
    assert not stored
    engine.error = None
    assert (await _fetch(single_flight, _keyed("a"), engine.compute))[b"a"] == _vector("a")


async def test_a_failure_ends_the_request_at_once_and_cancels_its_other_batch():
    """A request that waits for two computations fails with the first failure."""
    first_engine, second_engine = _FakeEngine(), _FakeEngine()
    single_flight = _single_flight()
    first_request = asyncio.create_task(_fetch(single_flight, _keyed("a"), first_engine.compute))
    await _settle()
    both = asyncio.create_task(_fetch(single_flight, _keyed("a", "b"), second_engine.compute))
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
        await _fetch(_single_flight(), _keyed("a"), compute)
    assert caught.value.retry_after_seconds is not None


async def test_too_many_texts_at_a_time_are_refused():
    """The limit applies to new texts; joining is always possible."""
    engine = _FakeEngine()
    single_flight = _single_flight(limit_texts=3)
    first_request = asyncio.create_task(_fetch(single_flight, _keyed("a", "b"), engine.compute))
    await _settle()
    with pytest.raises(ResourceExhausted) as caught:
        await _fetch(single_flight, _keyed("c"), engine.compute)
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.metadata["limit"] == "2"
    joined = asyncio.create_task(_fetch(single_flight, _keyed("b"), engine.compute))
    await _settle()
    engine.gate.set()
    assert (await joined)[b"b"] == _vector("b")
    await first_request
    assert (await _fetch(single_flight, _keyed("c"), engine.compute))[b"c"] == _vector("c")


async def test_a_tenant_at_its_limit_does_not_refuse_another():
    """What one tenant may have in computation leaves room for the next one."""
    engine = _FakeEngine()
    single_flight = _single_flight(limit_texts=30)
    for number in range(100):
        request = _fetch(single_flight, _keyed(f"a{number}"), engine.compute)
        task = asyncio.create_task(request)
        await _settle()
        if task.done():
            assert isinstance(task.exception(), ResourceExhausted)
            break
    other = asyncio.create_task(
        _fetch(single_flight, _keyed("b"), engine.compute, caller=Caller("other", "other"))
    )
    await _settle()
    engine.gate.set()
    assert (await other)[b"b"] == _vector("b")


async def test_many_texts_are_computed_in_several_calls():
    """A call is limited, so that what it computed is known while the next one runs."""
    engine, stored = _FakeEngine(), _Store()
    engine.gate.set()
    texts = [f"text {number}" for number in range(TEXTS_PER_CALL + 1)]
    await _fetch(_single_flight(stored, limit_texts=1000), _keyed(*texts), engine.compute)
    assert [len(batch) for batch in engine.batches] == [TEXTS_PER_CALL, 1]
    assert len(stored) == len(texts)


@pytest.mark.parametrize("joined", [0, 1])
async def test_what_was_computed_for_a_request_that_left_is_reported(joined):
    """It pays for its calls that were complete, and for all of them if others go on waiting."""
    texts = [f"text {number}" for number in range(TEXTS_PER_CALL + 1)]
    calls = 0
    second_call, gate = asyncio.Event(), asyncio.Event()

    async def compute(some: Sequence[str]) -> Sequence[Vector]:
        nonlocal calls
        calls += 1
        if calls == 2:
            second_call.set()
            await gate.wait()
        return [_vector(text) for text in some]

    single_flight = _single_flight(limit_texts=1000)
    unpaid: list[Sequence[Vector]] = []
    starter = asyncio.create_task(
        _fetch(single_flight, _keyed(*texts), compute, unpaid=unpaid.append)
    )
    await second_call.wait()
    others = [
        asyncio.create_task(_fetch(single_flight, _keyed(*texts), compute)) for _ in range(joined)
    ]
    await _settle()
    starter.cancel()
    await asyncio.wait([starter])
    gate.set()
    await asyncio.gather(*others)
    await _settle()
    assert [len(vectors) for vectors in unpaid] == [TEXTS_PER_CALL + joined]


async def test_a_request_that_got_its_vectors_is_not_reported():
    """It pays in its answer."""
    engine = _FakeEngine()
    engine.gate.set()
    unpaid: list[Sequence[Vector]] = []
    await _fetch(_single_flight(), _keyed("a"), engine.compute, unpaid=unpaid.append)
    await _settle()
    assert not unpaid
