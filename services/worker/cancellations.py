"""Stops jobs of this worker that are cancelled while they run."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from google.protobuf.timestamp_pb2 import Timestamp
from headrace.events.v1 import events_pb2

T = TypeVar("T")


class JobCancelledError(Exception):
    """The job was cancelled while it ran."""


class Cancellation:
    """Whether one job is cancelled.

    Args:
        create_time: when the job was accepted; None: unknown. The id may be used again.
    """

    def __init__(self, create_time: Timestamp | None = None) -> None:
        self._create_time = create_time
        self._requested = False
        self._scope: asyncio.Timeout | None = None

    def is_meant_by(self, event: events_pb2.JobCancelled) -> bool:
        """Returns whether an event is about this job, and not about another one with its id."""
        if self._create_time is None or not event.HasField("job_create_time"):
            return True
        return event.job_create_time == self._create_time

    def request(self) -> None:
        """Stops what `run` runs now or later."""
        if self._requested:
            return
        self._requested = True
        if self._scope is not None:
            self._scope.reschedule(asyncio.get_running_loop().time())

    async def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Returns what the work returns.

        Raises:
            JobCancelledError: the job was cancelled first.
        """
        if self._requested:
            raise JobCancelledError
        # A timeout without a time: the standard way to cancel a block from outside.
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._scope = scope
                return await work()
        except Exception as error:
            if scope.expired():  # whatever the interrupted call made of it
                raise JobCancelledError from error
            raise
        finally:
            self._scope = None


class Cancellations:
    """The jobs of this worker that can be cancelled."""

    def __init__(self) -> None:
        self._by_job: defaultdict[str, set[Cancellation]] = defaultdict(set)

    def cancel(self, event: events_pb2.JobCancelled) -> None:
        """Stops a job if it runs here."""
        for cancellation in self._by_job.get(event.job_id, ()):
            if cancellation.is_meant_by(event):
                cancellation.request()

    @contextmanager
    def of(self, job_id: str, create_time: Timestamp | None = None) -> Iterator[Cancellation]:
        """Makes a job one that can be cancelled, as long as the block runs."""
        cancellation = Cancellation(create_time)
        self._by_job[job_id].add(cancellation)
        try:
            yield cancellation
        finally:
            self._by_job[job_id].discard(cancellation)
            if not self._by_job[job_id]:
                del self._by_job[job_id]
