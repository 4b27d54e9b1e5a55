"""Databases of earlier versions keep all jobs when they are migrated."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import sqlalchemy as sa
from google.rpc import code_pb2, error_details_pb2, status_pb2

import services.jobs
from libs.clock import SystemClock
from libs.db import UtcDateTime, create_engine, migrate, transaction
from services.jobs.domain import Job, State
from services.jobs.erasure import Erasure
from services.jobs.expiry import ExpiredJobs
from services.jobs.store import JobStore
from tests.support.databases import DATABASES, empty_database, shared_postgres

pytestmark = pytest.mark.integration

MIGRATIONS = Path(services.jobs.__file__).parent / "migrations"
RETENTION = timedelta(days=30)
NOW = datetime.now(UTC)

# The columns of the first version.
old_jobs = sa.table(
    "jobs",
    *(sa.column(name, sa.Text) for name in ("job_id", "tenant", "user")),
    *(sa.column(name, sa.Integer) for name in ("state", "attempt_count")),
    *(sa.column(name, UtcDateTime) for name in ("create_time", "update_time")),
    *(sa.column(f"failure_{name}", sa.Text) for name in ("code", "reason", "message")),
    *(sa.column(name, sa.LargeBinary) for name in ("payload", "result")),
)


@pytest.fixture(params=DATABASES)
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    async with shared_postgres() as postgres_url:
        yield await empty_database(request.param, folder=tmp_path, postgres_url=postgres_url)


@pytest.fixture
def first_migration(tmp_path: Path) -> Path:
    folder = tmp_path / "migrations"
    folder.mkdir()
    shutil.copy(MIGRATIONS / "0001_jobs_and_outbox.py", folder)
    return folder


def old_job(job_id: str, state: State, *, age: timedelta, **fields: Any) -> dict[str, Any]:
    times = {"create_time": NOW - age, "update_time": NOW - age}
    values = dict.fromkeys(("failure_code", "failure_reason", "failure_message", "result"))
    return {
        **values, **times, "job_id": job_id, "tenant": "acme", "user": "ann", "state": state,
        "attempt_count": 1, "payload": job_id.encode(), **fields,
    }  # fmt: skip


async def first_version(url: str, folder: Path) -> None:
    """Makes a database with the first migration, and fills it."""
    await migrate(url, "jobs", folder=folder)
    day = timedelta(days=1)
    failure = {
        "failure_code": "NOT_FOUND",
        "failure_reason": "MODEL_NOT_FOUND",
        "failure_message": "no model smollm3",
    }
    engine = create_engine(url)
    async with transaction(engine) as connection:
        for values in (
            old_job("queued", State.QUEUED, age=40 * day),
            old_job("running", State.RUNNING, age=40 * day),
            old_job("succeeded", State.SUCCEEDED, age=20 * day, result=b"r"),
            old_job("failed", State.FAILED, age=20 * day, **failure),
            old_job("strange", State.FAILED, age=20 * day, **{**failure, "failure_code": "?"}),
            old_job("old", State.SUCCEEDED, age=31 * day, result=b"r"),
        ):
            await connection.execute(sa.insert(old_jobs).values(values))
    await engine.dispose()


async def test_the_first_version_is_migrated_without_loss(url: str, first_migration: Path) -> None:
    """Errors become Status; jobs that had ended expire by the setting, others do not."""
    await first_version(url, first_migration)
    await migrate(url, "jobs")
    engine = create_engine(url)
    store = JobStore(engine)
    erasure = Erasure(store=store, js=cast("Any", None))  # these jobs have no messages
    expired = ExpiredJobs(
        store=store,
        erasure=erasure,
        clock=SystemClock(),
        interval_seconds=60,
        retention=RETENTION,
    )
    await expired.delete()

    async def job(job_id: str) -> Job | None:
        return await store.get(job_id, tenant="acme", now=NOW - timedelta(days=365))

    for job_id in ("queued", "running"):
        read = await job(job_id)
        assert read is not None
        assert (read.payload, read.expire_time, read.error) == (job_id.encode(), None, None)
    for job_id in ("succeeded", "failed"):
        read = await job(job_id)
        assert read is not None
        assert read.expire_time == read.update_time + RETENTION
    assert await job("old") is None  # expired by the setting, and deleted
    check_error(await job("failed"), code_pb2.NOT_FOUND)
    check_error(await job("strange"), code_pb2.UNKNOWN)
    await engine.dispose()


def check_error(job: Job | None, code: int) -> None:
    """Checks a converted error."""
    assert job is not None
    assert job.error is not None
    status = status_pb2.Status.FromString(job.error)
    (detail,) = status.details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    assert (status.code, status.message) == (code, "no model smollm3")
    assert (info.reason, info.domain) == ("MODEL_NOT_FOUND", "headrace")
