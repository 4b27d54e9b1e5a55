"""Computations under way: each text at most once at a time, whoever asks for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from libs.errors import ResourceExhausted, Unavailable
from services.embedding_cache import metrics
from services.embedding_cache.domain import Vector

RETRY_SECONDS = 1.0

# Texts in, their vectors out, in the same order.
Compute = Callable[[Sequence[str]], Awaitable[Sequence[Vector]]]


class _Computation:
    """One batch that is being computed, in a task of its own: it does not end with who began it."""

    __slots__ = ("task", "texts", "waiters")

    task: asyncio.Task[Mapping[bytes, Vector]]

    def __init__(self, texts: Mapping[bytes, str]) -> None:
        self.texts = texts
        self.waiters = 0


class SingleFlight:
    """Lets concurrent requests share computations.

    A batch goes on as long as one request waits for it, and is cancelled when the last has left. If
    it fails, all who wait fail, and whoever asks next begins anew.
    """

    def __init__(self, *, keep: Callable[[bytes, Vector], None], limit_texts: int) -> None:
        """Makes a place for computations.

        Args:
            keep: takes each computed vector, before those who wait for it go on.
            limit_texts: how many texts may be under way at a time.
        """
        self._keep = keep
        self._limit_texts = limit_texts
        self._flying: dict[bytes, _Computation] = {}
        metrics.IN_FLIGHT_LIMIT_TEXTS.set(limit_texts)

    def __contains__(self, key: bytes) -> bool:
        """Tells whether this text is being computed now."""
        return key in self._flying

    async def fetch(self, texts: Mapping[bytes, str], compute: Compute) -> Mapping[bytes, Vector]:
        """Returns the vectors of texts: joins who computes them, computes the rest in one batch.

        Up to its first await it runs in one step with its caller.

        Raises:
            ResourceExhausted: too many texts are under way (`QUEUE_FULL`).
            HeadraceError: what the computation raised.
        """
        flights = {self._flying[key] for key in texts if key in self._flying}
        missing = {key: text for key, text in texts.items() if key not in self._flying}
        if missing:
            flights.add(self._begin(missing, compute))
        for flight in flights:
            flight.waiters += 1
        try:
            return await _results(flights)
        finally:
            for flight in flights:
                self._leave(flight)

    def _begin(self, texts: Mapping[bytes, str], compute: Compute) -> _Computation:
        if len(self._flying) + len(texts) > self._limit_texts:
            raise ResourceExhausted(
                f"more than {self._limit_texts} texts are being computed",
                reason="QUEUE_FULL",
                metadata={"queue": "embedding_cache.in_flight", "limit": str(self._limit_texts)},
                retry_after_seconds=RETRY_SECONDS,
            )
        flight = _Computation(texts)
        flight.task = asyncio.create_task(self._fly(flight, compute))
        flight.task.add_done_callback(_mark_error_as_seen)
        self._flying.update(dict.fromkeys(texts, flight))
        metrics.IN_FLIGHT_TEXTS.set(len(self._flying))
        return flight

    async def _fly(self, flight: _Computation, compute: Compute) -> Mapping[bytes, Vector]:
        try:
            computed = await compute(list(flight.texts.values()))
            vectors = dict(zip(flight.texts, computed, strict=True))
            for key, vector in vectors.items():
                self._keep(key, vector)
            return vectors
        finally:
            # In the same step as the end: nobody joins what has failed.
            self._land(flight)

    def _leave(self, flight: _Computation) -> None:
        flight.waiters -= 1
        if flight.waiters == 0 and not flight.task.done():
            flight.task.cancel()
            # Now, and not when the task hears of it: nobody joins what is cancelled.
            self._land(flight)

    def _land(self, flight: _Computation) -> None:
        for key in flight.texts:
            if self._flying.get(key) is flight:
                del self._flying[key]
        metrics.IN_FLIGHT_TEXTS.set(len(self._flying))


async def _results(flights: set[_Computation]) -> Mapping[bytes, Vector]:
    tasks = [flight.task for flight in flights]
    # `wait` leaves the tasks alone when the one who waits is cancelled.
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    vectors: dict[bytes, Vector] = {}
    for task in done:
        if task.cancelled():  # not by us: somebody still waits
            raise Unavailable(
                "the computation was given up",
                reason="BACKEND_FAILED",
                retry_after_seconds=RETRY_SECONDS,
            )
        vectors.update(task.result())
    return vectors


def _mark_error_as_seen(task: asyncio.Task[Mapping[bytes, Vector]]) -> None:
    # Those who wait have it; where all have left, asyncio need not complain.
    if not task.cancelled():
        task.exception()
