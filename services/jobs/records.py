"""Changes of jobs: written down, then told to those who watch."""

from __future__ import annotations

import structlog
from prometheus_client import Counter, Histogram

from libs.clock import Clock
from services.jobs.domain import Failure, Finished, Job, Outcome, Step, advance, give_up
from services.jobs.store import JobStore
from services.jobs.watchers import JobWatchers

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
    """Takes jobs from state to state."""

    def __init__(
        self, *, store: JobStore, watchers: JobWatchers, clock: Clock, max_result_bytes: int
    ) -> None:
        self._store = store
        self._watchers = watchers
        self._clock = clock
        self._max_result_bytes = max_result_bytes

    async def take(self, job_id: str, outcome: Outcome) -> None:
        """Notes what a worker told. Harmless if it was noted before or comes too late."""
        outcome = self._bounded(outcome)
        changed = await self._step(job_id, lambda job: advance(job, outcome, self._clock.now()))
        if not changed:
            _IGNORED.inc()

    async def give_up(self, job_id: str, failure: Failure) -> None:
        """Ends a job that no worker will end."""
        await self._step(job_id, lambda job: give_up(job, failure, self._clock.now()))

    async def _step(self, job_id: str, step: Step) -> bool:
        job = await self._store.apply(job_id, step)
        if job is None:
            return False
        self._watchers.tell(job)
        if job.state.terminal:
            _tell_end(job)
        return True

    def _bounded(self, outcome: Outcome) -> Outcome:
        if not isinstance(outcome, Finished) or outcome.result is None:
            return outcome
        size, limit = len(outcome.result), self._max_result_bytes
        if size <= limit:
            return outcome
        text = f"the result has {size} bytes, more than {limit}"
        failure = Failure("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE", text)
        return Finished(outcome.attempt, failure=failure)


def _tell_end(job: Job) -> None:
    state = job.state.name.lower()
    seconds = (job.update_time - job.create_time).total_seconds()
    _ENDED.labels(state).inc()
    _DURATION.observe(seconds)
    _log.info(
        "job ended",
        job_id=job.job_id,
        tenant=job.tenant,
        state=state,
        reason=job.failure.reason if job.failure else None,
        attempt_count=job.attempt_count,
        duration_seconds=round(seconds, 6),
    )
