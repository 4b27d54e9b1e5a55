"""Computes each text at most once at a time, however many requests of a tenant ask for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import islice

from libs.errors import ResourceExhausted
from libs.shared_limit import SharedLimit
from services.embedding_cache import metrics
from services.embedding_cache.domain import RETRY_SECONDS, Caller, Vector, backend_failed

# Takes texts, returns their vectors in the same order.
Compute = Callable[[Sequence[str]], Awaitable[Sequence[Vector]]]
# Takes what was computed for a request that did not get it.
Unpaid = Callable[[Sequence[Vector]], None]

# A batch is computed in calls of so many texts. What a call has computed is stored, and billed,
# also if the batch is cancelled later.
TEXTS_PER_CALL = 256
# A tenant may have twice as many texts in computation as are left to all others: alone two thirds.
ALPHA = 2.0


class _Batch:
    """Texts that one task computes. The task does not belong to the request that started it."""

    __slots__ = ("caller", "task", "texts", "vectors", "waiter_count")

    task: asyncio.Task[Mapping[bytes, Vector]]

    def __init__(self, texts: Mapping[bytes, str], caller: Caller) -> None:
        self.texts = texts
        self.caller = caller
        self.vectors: dict[bytes, Vector] = {}
        self.waiter_count = 0


class SingleFlight:
    """Shares computations between concurrent requests.

    A batch runs as long as at least one request waits for it, and is cancelled when the last waiter
    leaves. If it fails, all waiters fail, and the next request starts a new computation.
    """

    def __init__(self, *, store: Callable[[str, bytes, Vector], None], limit_texts: int) -> None:
        """Starts without computations.

        Args:
            store: called with owner, key and vector of each text that was computed, before its
                waiters resume.
            limit_texts: most texts that are computed at the same time, for all tenants.
        """
        self._store = store
        self._limit = SharedLimit(limit_texts, alpha=ALPHA)
        self._batches: dict[bytes, _Batch] = {}
        metrics.IN_FLIGHT_LIMIT_TEXTS.set(limit_texts)

    def __contains__(self, key: bytes) -> bool:
        """Returns whether the text with this key is being computed."""
        return key in self._batches

    async def fetch(
        self, texts: Mapping[bytes, str], compute: Compute, *, caller: Caller, unpaid: Unpaid
    ) -> Mapping[bytes, Vector]:
        """Returns vectors: joins the computations that run, and computes the rest in one batch.

        It joins and starts them before its first await, in the same step as its caller.

        Args:
            texts: by key.
            compute: computes the vectors of some texts.
            caller: whose limit counts, and who owns the vectors.
            unpaid: called if this raises, after the batch that it started has ended: with what
                that batch computed, if anything.

        Raises:
            ResourceExhausted: too many texts are being computed (`QUEUE_FULL`).
            HeadraceError: the error of the computation.
        """
        batches = {self._batches[key] for key in texts if key in self._batches}
        missing = {key: text for key, text in texts.items() if key not in self._batches}
        own: _Batch | None = None
        if missing:
            own = self._start(missing, compute, caller)
            batches.add(own)
        for batch in batches:
            batch.waiter_count += 1
        try:
            return await _results(batches)
        except BaseException:
            if own is not None:
                _call_with_vectors(unpaid, own)
            raise
        finally:
            for batch in batches:
                self._leave(batch)

    def _start(self, texts: Mapping[bytes, str], compute: Compute, caller: Caller) -> _Batch:
        if not self._limit.take(caller.tenant, len(texts)):
            share = self._limit.share_of(caller.tenant)
            raise ResourceExhausted.of_queue(
                "embedding_cache.in_flight",
                f"{self._limit.held_by(caller.tenant)} texts of this tenant are being computed, "
                f"and it may have {share} now; retry later",
                limit=share,
                retry_after_seconds=RETRY_SECONDS,
            )
        batch = _Batch(texts, caller)
        batch.task = asyncio.create_task(self._run(batch, compute))
        batch.task.add_done_callback(lambda _: self._limit.release(caller.tenant, len(texts)))
        batch.task.add_done_callback(_mark_error_as_retrieved)
        self._batches.update(dict.fromkeys(texts, batch))
        metrics.IN_FLIGHT_TEXTS.set(len(self._batches))
        return batch

    async def _run(self, batch: _Batch, compute: Compute) -> Mapping[bytes, Vector]:
        remaining = iter(batch.texts.items())
        try:
            while part := dict(islice(remaining, TEXTS_PER_CALL)):
                computed = await compute(list(part.values()))
                for key, vector in zip(part, computed, strict=True):
                    self._store(batch.caller.owner, key, vector)
                    batch.vectors[key] = vector
            return batch.vectors
        finally:
            # In the same step as the end of the task, so that no request joins a failed batch.
            self._remove(batch)

    def _leave(self, batch: _Batch) -> None:
        batch.waiter_count -= 1
        if batch.waiter_count == 0 and not batch.task.done():
            batch.task.cancel()
            # The task ends in a later step; until then no request must join it.
            self._remove(batch)

    def _remove(self, batch: _Batch) -> None:
        for key in batch.texts:
            if self._batches.get(key) is batch:
                del self._batches[key]
        metrics.IN_FLIGHT_TEXTS.set(len(self._batches))


async def _results(batches: set[_Batch]) -> Mapping[bytes, Vector]:
    tasks = [batch.task for batch in batches]
    # `wait` does not cancel the tasks when its caller is cancelled.
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    vectors: dict[bytes, Vector] = {}
    for task in done:
        if task.cancelled():  # not by `_leave`: this caller still waits
            raise backend_failed("the computation was cancelled; retry")
        vectors.update(task.result())
    return vectors


def _call_with_vectors(unpaid: Unpaid, batch: _Batch) -> None:
    def ended(_: asyncio.Task[Mapping[bytes, Vector]]) -> None:
        if batch.vectors:
            unpaid(list(batch.vectors.values()))

    batch.task.add_done_callback(ended)


def _mark_error_as_retrieved(task: asyncio.Task[Mapping[bytes, Vector]]) -> None:
    # The waiters have the error; without waiters, asyncio would log it.
    if not task.cancelled():
        task.exception()
