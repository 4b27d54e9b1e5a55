"""Compares the records with the bus: jobs whose message was lost are published again.

JetStream is transport, not the record: it may lose what it acknowledged. A message counts as lost
only when it cannot be in the stream any more, since a second one would run the job twice.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

import nats.errors
import structlog
from nats.js import JetStreamContext
from nats.js.errors import Error as JetStreamError
from nats.js.errors import NotFoundError
from prometheus_client import Counter, Gauge

from libs.bus.connection import ensure_streams
from libs.bus.subjects import JOBS, OUTCOMES
from libs.clock import Clock
from libs.errors import HeadraceError, Internal
from services.jobs.outbox import OutboxPublisher
from services.jobs.outbox_store import OutboxStore, UnackedJob
from services.jobs.records import JobRecords
from services.jobs.store import JobStore

_log = structlog.get_logger()

_REPUBLISHED = Counter("headrace_jobs_lost_republished", "Jobs whose message was found lost.")
_FAILURES = Counter(
    "headrace_jobs_reconciler_failures", "Comparisons, and jobs in them, that failed unexpectedly."
)
_WAITING = Gauge("headrace_jobs_waiting", "Jobs that wait for a worker.")

# In one round.
MAX_LOST_JOBS = 100
# By how much the clocks of this machine and of the bus may differ.
CLOCK_MARGIN = timedelta(seconds=60)
OUTCOMES_WAIT_SECONDS = 10.0
OUTCOMES_PAUSE_SECONDS = 0.1


class Reconciler:
    """Looks regularly for jobs that would wait forever.

    Args:
        store: the records.
        outbox_store: when jobs were published.
        records: gives jobs up.
        outbox: publishes.
        js: JetStream.
        clock: the time.
        interval_seconds: between two comparisons.
        lost_after_seconds: a job that changed more recently is not lost.
        max_publishes: a job that was published so often and is lost again is given up.
        max_waiting: the limit up to which waiting jobs are counted.
    """

    def __init__(
        self,
        *,
        store: JobStore,
        outbox_store: OutboxStore,
        records: JobRecords,
        outbox: OutboxPublisher,
        js: JetStreamContext,
        clock: Clock,
        interval_seconds: float,
        lost_after_seconds: float,
        max_publishes: int,
        max_waiting: int,
    ) -> None:
        self._store = store
        self._outbox_store = outbox_store
        self._records = records
        self._outbox = outbox
        self._js = js
        self._clock = clock
        self._interval_seconds = interval_seconds
        self._lost_after = timedelta(seconds=lost_after_seconds)
        self._max_publishes = max_publishes
        self._max_waiting = max_waiting

    async def run(self) -> None:
        """Compares until it is cancelled; no error ends it."""
        while True:
            await self._clock.sleep(self._interval_seconds)
            try:
                _WAITING.set(await self._store.count_waiting(limit=self._max_waiting))
                await self.reconcile()
            except (TimeoutError, nats.errors.Error, JetStreamError, HeadraceError) as error:
                _log.warning("cannot compare jobs with the bus", error=error)
            except Exception:  # noqa: BLE001  # the next round may succeed
                _FAILURES.inc()
                _log.exception("comparison of jobs with the bus failed")

    async def reconcile(self) -> None:
        """Compares once."""
        now = self._clock.now()
        # A bus that lost everything would not accept jobs either.
        await ensure_streams(self._js, streams=[JOBS, OUTCOMES])
        # In this order: the outcome of a job that has left the stream was published before.
        oldest = await self._oldest_message_time()
        await self._wait_for_outcomes()
        published_before = now - self._lost_after
        if oldest is not None:
            published_before = min(published_before, oldest - CLOCK_MARGIN)
        lost_jobs = await self._outbox_store.lost(
            published_before=published_before,
            unchanged_since=now - self._lost_after,
            limit=MAX_LOST_JOBS,
        )
        for lost in lost_jobs:
            await self._recover_or_postpone(lost)
        if lost_jobs:
            self._outbox.wake()

    async def _recover_or_postpone(self, lost: UnackedJob) -> None:
        """Recovers a job; one that cannot be recovered delays no other."""
        try:
            await self._recover(lost)
        except HeadraceError:  # the database is away
            raise
        except Exception:  # noqa: BLE001  # one job must not stop the others
            _FAILURES.inc()
            _log.exception("lost job not recovered", job_id=lost.job_id)
            await self._outbox_store.postpone(lost, self._clock.now())

    async def _recover(self, lost: UnackedJob) -> None:
        _log.warning("job was lost by the bus", job_id=lost.job_id, times=lost.publish_count)
        if lost.publish_count >= self._max_publishes:
            text = f"the bus lost it {lost.publish_count} times"
            await self._records.give_up(lost.job_id, Internal(text, reason="INTERNAL"))
        else:
            await self._outbox_store.publish_again(lost)
            _REPUBLISHED.inc()

    async def _wait_for_outcomes(self) -> None:
        """Waits until all outcomes so far are stored: a job that has ended is not lost."""
        async with asyncio.timeout(OUTCOMES_WAIT_SECONDS):
            state = (await self._js.stream_info(OUTCOMES.name)).state
            last_sequence = state.last_seq
            while state.messages and state.first_seq <= last_sequence:
                await self._clock.sleep(OUTCOMES_PAUSE_SECONDS)
                state = (await self._js.stream_info(OUTCOMES.name)).state

    async def _oldest_message_time(self) -> datetime | None:
        """Returns when the oldest job in the stream was published; None: the stream is empty."""
        while True:
            state = (await self._js.stream_info(JOBS.name)).state
            if not state.messages:
                return None
            try:
                return (await self._js.get_msg(JOBS.name, state.first_seq)).time
            except NotFoundError:  # acknowledged since the state was read
                continue
