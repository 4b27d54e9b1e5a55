"""Records of jobs and of their steps, for tests of the store."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from services.jobs.domain import Job, Outcome, Step, advance

START = datetime(2026, 11, 1, tzinfo=UTC)
RETENTION = timedelta(days=7)
LATER = START + timedelta(days=1)


def job(number: int, payload: bytes = b"p") -> Job:
    moment = START + timedelta(seconds=number)
    return Job(
        job_id=f"job-{number:04}",
        tenant="acme",
        user="ann",
        payload=payload,
        create_time=moment,
        update_time=moment,
    )


def step(outcome: Outcome) -> Step:
    return lambda job: advance(job, outcome, now=LATER, retention=RETENTION)
