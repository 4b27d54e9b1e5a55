"""Jobs from and to rows of the table `jobs`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
import structlog
from prometheus_client import Counter

from services.jobs.domain import Job, State
from services.jobs.tables import jobs

_log = structlog.get_logger()

_UNREADABLE = Counter(
    "headrace_jobs_unreadable_rows", "Rows that a list left out because they cannot be read."
)

# Every column but the two that may have megabytes.
SUMMARY = tuple(column for column in jobs.columns if column.name not in {"payload", "result"})
# A row without payload, result and error, in a response: names, times, and what protobuf adds.
SUMMARY_BYTES = 256
SIZE = (
    sa.func.length(jobs.c.payload)
    + sa.func.coalesce(sa.func.length(jobs.c.result), 0)
    + sa.func.coalesce(sa.func.length(jobs.c.error), 0)
    + SUMMARY_BYTES
)
SUMMARY_SIZE = sa.func.coalesce(sa.func.length(jobs.c.error), 0) + SUMMARY_BYTES


def job_of(row: sa.Row[Any]) -> Job:
    """Returns the job in a row.

    Raises:
        ValueError: it has a state that this version does not know.
    """
    values = row._mapping  # noqa: SLF001  # SQLAlchemy's documented name
    return Job(
        job_id=row.job_id,
        tenant=row.tenant,
        user=row.user,
        state=State(row.state),
        attempt_count=row.attempt_count,
        create_time=row.create_time,
        update_time=row.update_time,
        payload=values.get("payload", b""),
        result=values.get("result"),
        error=row.error,
        expire_time=row.expire_time,
    )


def readable_jobs(rows: Iterable[sa.Row[Any]]) -> list[Job]:
    """Returns the jobs in the rows; a row that cannot be read is logged, counted and left out."""
    found = []
    for row in rows:
        try:
            found.append(job_of(row))
        except ValueError as error:
            _UNREADABLE.inc()
            _log.error("row cannot be read", job_id=row.job_id, error=error)
    return found


def row_of(job: Job) -> dict[str, Any]:
    """Returns all columns of a job."""
    return {
        "job_id": job.job_id,
        "tenant": job.tenant,
        "user": job.user,
        "create_time": job.create_time,
        "payload": job.payload,
        **changes_of(job),
    }


def changes_of(job: Job) -> dict[str, Any]:
    """Returns the columns that change while a job advances."""
    return {
        "state": int(job.state),
        "attempt_count": job.attempt_count,
        "update_time": job.update_time,
        "result": job.result,
        "error": job.error,
        "expire_time": job.expire_time,
    }
