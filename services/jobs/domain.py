"""Jobs and their states: queued, running, ended. A job never goes back to an earlier state."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from libs.errors import FailedPrecondition


class State(enum.IntEnum):
    """The values of `headrace.jobs.v1.JobState`; a job only moves to a higher one."""

    QUEUED = 1
    RUNNING = 2
    SUCCEEDED = 3
    FAILED = 4
    CANCELLED = 5

    @property
    def terminal(self) -> bool:
        """Whether it is final."""
        return self >= State.SUCCEEDED


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job.

    Attributes:
        payload: a serialised `JobPayload`; empty where it was not read.
        result: a serialised `JobResult`; None also where it was not read.
        error: a serialised `google.rpc.Status`.
        expire_time: when the job is deleted; set when it ends.
    """

    job_id: str
    tenant: str
    user: str
    payload: bytes
    create_time: datetime
    update_time: datetime
    state: State = State.QUEUED
    attempt_count: int = 0
    result: bytes | None = None
    error: bytes | None = None
    expire_time: datetime | None = None

    @property
    def name(self) -> str:
        """`jobs/{job_id}`."""
        return f"jobs/{self.job_id}"

    @property
    def progress(self) -> tuple[bool, int, int]:
        """Grows with every change of the job."""
        return self.state.terminal, self.attempt_count, self.state

    def same_request(self, other: Job) -> bool:
        """Returns whether both have the same tenant and payload."""
        return (self.tenant, self.payload) == (other.tenant, other.payload)

    def is_expired(self, now: datetime) -> bool:
        """Returns whether the job must not be shown any more, deleted or not."""
        return self.expire_time is not None and self.expire_time <= now


@dataclass(frozen=True)
class Started:
    """A worker started the job.

    Attributes:
        attempt: the number of the delivery.
        job_create_time: as in `Job`; None: unknown. The id may be used again by another job.
    """

    attempt: int
    job_create_time: datetime | None = None


@dataclass(frozen=True)
class Finished:
    """A worker finished the job. Exactly one of `result` and `error` is set, as in `Job`."""

    attempt: int
    result: bytes | None = None
    error: bytes | None = None
    job_create_time: datetime | None = None


Outcome = Started | Finished
# Returns the changed job, or None if nothing changes.
Step = Callable[[Job], Job | None]


def advance(job: Job, outcome: Outcome, *, now: datetime, retention: timedelta) -> Job | None:
    """Returns the job after an outcome, or None if the outcome changes nothing.

    Outcomes may arrive late, twice and in any order: a job that has ended does not change, and of
    two attempts the later one counts. An outcome of an earlier job with the same id does not count.
    """
    if job.state.terminal or outcome.job_create_time not in {None, job.create_time}:
        return None
    attempt_count = max(job.attempt_count, outcome.attempt)
    if isinstance(outcome, Started):
        if job.state is State.RUNNING and outcome.attempt <= job.attempt_count:
            return None
        return replace(
            job,
            state=State.RUNNING,
            attempt_count=attempt_count,
            update_time=max(job.update_time, now),
        )
    return _ended(
        job,
        State.FAILED if outcome.result is None else State.SUCCEEDED,
        now,
        retention,
        attempt_count=attempt_count,
        result=outcome.result,
        error=outcome.error,
    )


def give_up(job: Job, error: bytes, *, now: datetime, retention: timedelta) -> Job | None:
    """Returns the job as failed, without a worker; None if it has already ended."""
    finished = Finished(job.attempt_count, error=error)
    return advance(job, finished, now=now, retention=retention)


def cancel(job: Job, *, now: datetime, retention: timedelta) -> Job | None:
    """Returns the job as cancelled, or None if it already is.

    Raises:
        FailedPrecondition: it has succeeded or failed.
    """
    if job.state is State.CANCELLED:
        return None
    if job.state.terminal:
        raise FailedPrecondition(
            f"{job.name} has already {job.state.name.lower()}",
            reason="JOB_NOT_CANCELLABLE",
            metadata={"resource": job.name, "state": f"JOB_STATE_{job.state.name}"},
            resource=job.name,
        )
    return _ended(job, State.CANCELLED, now, retention)


def _ended(job: Job, state: State, now: datetime, retention: timedelta, **changes: Any) -> Job:
    end = max(job.update_time, now)
    return replace(job, state=state, update_time=end, expire_time=end + retention, **changes)
