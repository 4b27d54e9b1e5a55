"""How many jobs may wait, of all tenants and of one."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from libs.db import create_engine, migrate
from services.jobs.config import Settings
from services.jobs.domain import Job
from services.jobs.store import JobStore, QueueFullError, WaitingLimits

START = datetime(2026, 11, 1, tzinfo=UTC)
LIMITS = WaitingLimits(total=5, per_tenant=3)


def job(tenant: str, number: int) -> Job:
    return Job(
        job_id=f"{tenant}-{number}",
        tenant=tenant,
        user="ann",
        payload=b"p",
        create_time=START,
        update_time=START,
    )


async def test_the_jobs_of_one_tenant_leave_room_for_others(tmp_path: Path) -> None:
    """Its own limit is reached first, then that of all."""
    url = f"sqlite+aiosqlite:///{tmp_path}/jobs.db"
    await migrate(url, "jobs")
    engine = create_engine(url)
    store = JobStore(engine)

    async def submit(tenant: str, number: int) -> None:
        await store.submit(job(tenant, number), traceparent="", limits=LIMITS)

    for number in range(3):
        await submit("flood", number)
    with pytest.raises(QueueFullError) as caught:
        await submit("flood", 3)
    assert (caught.value.limit, caught.value.of_tenant) == (3, True)
    for number in range(2):
        await submit("acme", number)
    with pytest.raises(QueueFullError) as caught:
        await submit("acme", 2)
    assert (caught.value.limit, caught.value.of_tenant) == (5, False)
    await submit("flood", 0)  # it is there already
    await engine.dispose()


@pytest.mark.parametrize(
    ("total", "per_tenant", "expected"), [(10_000, None, 5000), (1, None, 1), (10, 9, 9)]
)
def test_a_tenant_gets_half_where_nothing_else_is_set(
    total: int, per_tenant: int | None, expected: int
) -> None:
    """At least one."""
    settings = Settings.model_construct(
        max_waiting_jobs=total, max_waiting_jobs_per_tenant=per_tenant
    )
    assert settings.waiting_limits() == WaitingLimits(total, expected)
