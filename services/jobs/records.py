"""Changes of jobs: stored, then passed on to watchers and workers."""

from __future__ import annotations

from datetime import timedelta

import structlog
from headrace.events.v1 import events_pb2
from prometheus_client import Counter, Histogram

from libs.bus.broadcast import Broadcaster
from libs.bus.subjects import JOB_CANCELLED
from libs.clock import Clock
from libs.errors import HeadraceError, ResourceExhausted
from libs.timestamps import to_timestamp
from services.jobs.domain import Finished, Job, Outcome, Step, advance, cancel, give_up
from services.jobs.store import JobStore
from services.jobs.watchers import JobWatchers
from services.jobs.wire import error_to_bytes, reason_of

_log = structlog.get_logger()

_ENDED = Counter("headrace_jobs_ended", "Jobs that ended, by state.", ["state"])
_IGNORED = Counter(
    "headrace_jobs_outcomes_ignored", "Outcomes that changed nothing: late or twice."
)
_DURATION = Histogram(
    "headrace_jobs_duration_seconds",
    "From submission to the end.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200),
)


class JobRecords:
    """Changes the state of jobs.

    Args:
        store: the records.
        watchers: informed of every change.
        broadcaster: informs workers of cancelled jobs.
        clock: the time.
        retention: how long jobs that have ended are kept.
        max_result_bytes: a job with a larger result fails.
    """

    def __init__(
        self,
        *,
        store: JobStore,
        watchers: JobWatchers,
        broadcaster: Broadcaster,
        clock: Clock,
        retention: timedelta,
        max_result_bytes: int,
    ) -> None:
        self._store = store
        self._watchers = watchers
        self._broadcaster = broadcaster
        self._clock = clock
        self._retention = retention
        self._max_result_bytes = max_result_bytes

    async def take(self, job_id: str, outcome: Outcome) -> None:
        """Stores what a worker reported. It may be stored already, or arrive too late."""
        outcome = self._bounded(outcome)
        changed = await self._step(
            job_id,
            lambda job: advance(job, outcome, now=self._clock.now(), retention=self._retention),
        )
        if not changed:
            _IGNORED.inc()

    async def give_up(self, job_id: str, error: HeadraceError) -> None:
        """Fails a job that no worker will finish."""
        status = error_to_bytes(error)
        await self._step(
            job_id,
            lambda job: give_up(job, status, now=self._clock.now(), retention=self._retention),
        )

    async def cancel(self, job_id: str) -> None:
        """Cancels a job and informs its worker, if it has one. Cancelling it again is OK.

        Raises:
            FailedPrecondition: it has succeeded or failed.
        """
        changed = await self._step(
            job_id, lambda job: cancel(job, now=self._clock.now(), retention=self._retention)
        )
        if changed:
            event = events_pb2.JobCancelled(
                job_id=job_id, event_time=to_timestamp(self._clock.now())
            )
            await self._broadcaster.publish(JOB_CANCELLED, event)

    async def _step(self, job_id: str, step: Step) -> bool:
        """Returns whether the job changed."""
        job = await self._store.apply(job_id, step)
        if job is None:
            return False
        self._watchers.notify(job)
        if job.state.terminal:
            _report_end(job)
        return True

    def _bounded(self, outcome: Outcome) -> Outcome:
        if not isinstance(outcome, Finished) or outcome.result is None:
            return outcome
        size, limit = len(outcome.result), self._max_result_bytes
        if size <= limit:
            return outcome
        error = ResourceExhausted(
            f"the result has {size} bytes, more than {limit}",
            reason="MESSAGE_TOO_LARGE",
            metadata={"limit_bytes": str(limit)},
        )
        return Finished(outcome.attempt, error=error_to_bytes(error))


def _report_end(job: Job) -> None:
    state = job.state.name.lower()
    seconds = (job.update_time - job.create_time).total_seconds()
    _ENDED.labels(state).inc()
    _DURATION.observe(seconds)
    _log.info(
        "job ended",
        job_id=job.job_id,
        tenant=job.tenant,
        state=state,
        reason=reason_of(job.error) if job.error is not None else None,
        attempt_count=job.attempt_count,
        duration_seconds=round(seconds, 6),
    )
