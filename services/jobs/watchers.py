"""Streams the changes of jobs to the watchers of this process, in order."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager

from prometheus_client import Gauge

from libs.errors import ResourceExhausted, Unavailable
from libs.shared_limit import SharedLimit
from services.jobs.domain import Job

_WATCHERS = Gauge("headrace_jobs_watchers", "Open WatchJob streams.")

# A watcher that is so many changes behind misses the oldest of them, never the last.
MAX_CHANGES_BEHIND = 16
# A tenant alone gets half of the streams.
STREAMS_ALPHA = 1.0
FULL_RETRY_AFTER_SECONDS = 5.0
RESTART_RETRY_AFTER_SECONDS = 1.0

# None: the process stops.
_Changes = asyncio.Queue[Job | None]


class JobWatchers:
    """Passes changes on to watchers.

    Changes that this process makes arrive immediately. For those that another replica makes, the
    record is read again every `poll_seconds`.
    """

    def __init__(self, *, limit: int, poll_seconds: float) -> None:
        self._streams = SharedLimit(limit, alpha=STREAMS_ALPHA)
        self._poll_seconds = poll_seconds
        self._closed = False
        self._watching: defaultdict[str, set[_Changes]] = defaultdict(set)

    def notify(self, job: Job) -> None:
        """Passes a changed job on to its watchers."""
        for changes in self._watching.get(job.job_id, ()):
            _put(changes, job)

    def close(self) -> None:
        """Ends all watches; those of jobs that have not ended get an error. The process drains."""
        self._closed = True
        for watching in self._watching.values():
            for changes in watching:
                _put(changes, None)

    async def watch(
        self, job_id: str, read: Callable[[], Awaitable[Job]], *, tenant: str
    ) -> AsyncGenerator[Job, None]:
        """Yields a job as it is now and after each change; returns when it has ended.

        Args:
            job_id: the job.
            read: reads its record.
            tenant: who watches.

        Raises:
            ResourceExhausted: the tenant, or all of them, have too many open streams.
            Unavailable: the process stops; another replica can continue.
        """
        with self._subscribed(job_id, tenant) as changes:
            job = await read()  # after subscribing, so that no change is missed
            yield job
            while not job.state.terminal:
                newer = await self._newer(changes, read)
                if newer.progress > job.progress:
                    job = newer
                    yield job

    async def _newer(self, changes: _Changes, read: Callable[[], Awaitable[Job]]) -> Job:
        try:
            async with asyncio.timeout(self._poll_seconds):
                change = None if self._closed else await changes.get()
        except TimeoutError:
            return await read()
        if change is None:
            raise Unavailable(
                "the service restarts; call WatchJob again",
                reason="DEPENDENCY_UNAVAILABLE",
                metadata={"dependency": "jobs"},
                retry_after_seconds=RESTART_RETRY_AFTER_SECONDS,
            )
        return change

    @contextmanager
    def _subscribed(self, job_id: str, tenant: str) -> Iterator[_Changes]:
        if not self._streams.take(tenant):
            held = self._streams.held_by(tenant)
            limit = max(held, self._streams.share_of(tenant))
            raise ResourceExhausted.of_queue(
                "watchers",
                f"this tenant has {held} open WatchJob streams, and it may have {limit} now",
                limit=limit,
                retry_after_seconds=FULL_RETRY_AFTER_SECONDS,
            )
        changes = _Changes(MAX_CHANGES_BEHIND)
        self._watching[job_id].add(changes)
        _WATCHERS.set(self._streams.used)
        try:
            yield changes
        finally:
            self._streams.release(tenant)
            _WATCHERS.set(self._streams.used)
            self._watching[job_id].discard(changes)
            if not self._watching[job_id]:
                del self._watching[job_id]


def _put(changes: _Changes, change: Job | None) -> None:
    if changes.full():
        changes.get_nowait()
    changes.put_nowait(change)
