"""Changes of jobs: stored, then passed on to watchers and workers."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import structlog
from prometheus_client import Counter, Histogram

from libs.bus.broadcast import Broadcaster
from libs.bus.subjects import JOB_CANCELLED
from libs.clock import Clock
from libs.errors import HeadraceError, ResourceExhausted
from services.jobs.domain import Finished, Job, Outcome, Step, advance, cancel, give_up
from services.jobs.erasure import Erasure
from services.jobs.store import JobStore
from services.jobs.watchers import JobWatchers
from services.jobs.wire import cancelled_event, error_to_bytes, reason_of

_log = structlog.get_logger()

_ENDED = Counter("headrace_jobs_ended", "Jobs that ended, by state.", ["state"])
_IGNORED = Counter(
    "headrace_jobs_outcomes_ignored", "Outcomes that changed nothing: late or duplicate."
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
        erasure: erases what was deleted.
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
        erasure: Erasure,
        clock: Clock,
        retention: timedelta,
        max_result_bytes: int,
    ) -> None:
        self._store = store
        self._watchers = watchers
        self._broadcaster = broadcaster
        self._erasure = erasure
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
        if changed is None:
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
        if changed is not None:
            await self._stop_worker(changed)

    async def delete(self, job_id: str, *, tenant: str) -> bool:
        """Deletes a job of a tenant and all that is left of it; stops its worker, if it has one.

        Returns whether there was such a job.
        """
        now = self._clock.now()
        found = await self._store.delete(job_id, tenant=tenant, now=now)
        if found is None:
            return False
        job, deleted = found
        _log.info("job deleted", job_id=job_id, tenant=tenant, state=job.state.name.lower())
        if not job.state.terminal:
            cancelled = cancel(job, now=now, retention=timedelta())
            assert cancelled is not None  # noqa: S101  # it was neither ended nor cancelled
            self._report(cancelled)
            await self._stop_worker(cancelled)
        await self._erasure.erase([deleted], because="requested")
        return True

    async def _stop_worker(self, job: Job) -> None:
        await self._broadcaster.publish(JOB_CANCELLED, cancelled_event(job, self._clock.now()))

    async def _step(self, job_id: str, step: Step) -> Job | None:
        """Returns the changed job, or None if nothing changed."""
        job = await self._store.apply(job_id, step)
        if job is not None:
            self._report(job)
        return job

    def _report(self, job: Job) -> None:
        self._watchers.notify(job)
        if job.state.terminal:
            _report_end(job)

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
        return replace(outcome, result=None, error=error_to_bytes(error))


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
