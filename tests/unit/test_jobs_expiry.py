"""Expired jobs are deleted in batches, and no error ends that."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from prometheus_client import REGISTRY

from libs.errors import Unavailable
from services.jobs.erasure import Erasure
from services.jobs.expiry import BATCH_JOBS, ExpiredJobs
from services.jobs.store import DeletedJob


class Clock:
    def now(self) -> datetime:
        return datetime(2026, 11, 1, tzinfo=UTC)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


class Store:
    """Has some jobs to delete, after some errors."""

    def __init__(self, *, errors: list[Exception], expired: int) -> None:
        self.errors = errors
        self.expired = expired
        self.deleted = asyncio.Event()

    async def fill_in_expire_times(self, _retention: timedelta, *, limit: int) -> int:
        if self.errors:
            raise self.errors.pop(0)
        return 0

    async def delete_expired(self, now: datetime, *, limit: int) -> list[DeletedJob]:
        count = min(limit, self.expired)
        self.expired -= count
        return [DeletedJob(f"job-{number}", now, None) for number in range(count)]

    async def erase_log(self) -> bool:
        if not self.expired:
            self.deleted.set()
        return True


def counted(name: str) -> float:
    labels = {"because": "expired"} if name == "deleted" else {}
    return REGISTRY.get_sample_value(f"headrace_jobs_{name}_total", labels) or 0.0


async def test_all_expired_jobs_are_deleted_and_counted() -> None:
    """After an outage and an unexpected error, which are counted as well."""
    deleted, failures = counted("deleted"), counted("expiry_failures")
    errors = [Unavailable("away", reason="DEPENDENCY_UNAVAILABLE"), ValueError("unexpected")]
    store = Store(errors=errors, expired=2 * BATCH_JOBS + 7)
    jobs = ExpiredJobs(
        store=cast(Any, store), erasure=Erasure(store=cast(Any, store), js=cast(Any, None)),
        clock=cast(Any, Clock()), interval_seconds=60, retention=timedelta(days=7),
    )  # fmt: skip
    running = asyncio.create_task(jobs.run())
    async with asyncio.timeout(10):
        await store.deleted.wait()
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert counted("deleted") == deleted + 2 * BATCH_JOBS + 7
    assert counted("expiry_failures") == failures + 2
