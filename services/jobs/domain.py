"""Jobs and the way they go: queued, running, ended. Never back."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime


class State(enum.IntEnum):
    """As `headrace.jobs.v1.JobState`, in the order in which a job goes through them."""

    QUEUED = 1
    RUNNING = 2
    SUCCEEDED = 3
    FAILED = 4

    @property
    def terminal(self) -> bool:
        """Whether nothing comes after it."""
        return self in (State.SUCCEEDED, State.FAILED)


@dataclass(frozen=True)
class Failure:
    """Why a job was given up.

    Attributes:
        code: the name of a `google.rpc.Code`.
        reason: a `headrace.common.v1.ErrorReason` without its prefix.
        message: for people.
    """

    code: str
    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job. `payload` and `result` are serialised protos."""

    job_id: str
    tenant: str
    user: str
    payload: bytes
    create_time: datetime
    update_time: datetime
    state: State = State.QUEUED
    attempt_count: int = 0
    result: bytes | None = None
    failure: Failure | None = None

    @property
    def name(self) -> str:
        """`jobs/{job_id}`."""
        return f"jobs/{self.job_id}"

    @property
    def progress(self) -> tuple[bool, int, int]:
        """Grows with every change of the job."""
        return self.state.terminal, self.attempt_count, self.state

    def same_request(self, other: Job) -> bool:
        """Whether both were asked for by the same tenant with the same payload."""
        return (self.tenant, self.payload) == (other.tenant, other.payload)


@dataclass(frozen=True)
class Started:
    """A worker has begun the job."""

    attempt: int


@dataclass(frozen=True)
class Finished:
    """A worker has ended the job; exactly one of `result` and `failure` is set."""

    attempt: int
    result: bytes | None = None
    failure: Failure | None = None


Outcome = Started | Finished
Step = Callable[[Job], Job | None]


def advance(job: Job, outcome: Outcome, now: datetime) -> Job | None:
    """Returns the job as an outcome leaves it, or None if it changes nothing.

    Outcomes may come late, twice and in any order: a job that has ended stays as it ended, and of
    two attempts the later one counts.
    """
    if job.state.terminal:
        return None
    if isinstance(outcome, Started):
        if job.state is State.RUNNING and outcome.attempt <= job.attempt_count:
            return None
        return replace(
            job,
            state=State.RUNNING,
            attempt_count=max(job.attempt_count, outcome.attempt),
            update_time=max(job.update_time, now),
        )
    return replace(
        job,
        state=State.FAILED if outcome.result is None else State.SUCCEEDED,
        attempt_count=max(job.attempt_count, outcome.attempt),
        result=outcome.result,
        failure=outcome.failure,
        update_time=max(job.update_time, now),
    )


def give_up(job: Job, failure: Failure, now: datetime) -> Job | None:
    """Returns the job ended by us, without a worker; None if it has ended already."""
    return advance(job, Finished(job.attempt_count, failure=failure), now)
