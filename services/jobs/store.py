"""Job records and the outbox, in SQL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from libs.db import snapshot, transaction
from services.jobs.domain import Failure, Job, State, Step
from services.jobs.tables import jobs, outbox


class QueueFullError(Exception):
    """As many jobs wait as may."""


@dataclass(frozen=True)
class OutboxJob:
    """A job whose message is to be published.

    Attributes:
        job: the job.
        traceparent: of the trace in which it was submitted, or empty.
        publish_count: how often it was published before.
    """

    job: Job
    traceparent: str
    publish_count: int


@dataclass(frozen=True)
class UnackedJob:
    """A job whose message may have been lost; `publish_count` times it was published."""

    job_id: str
    publish_count: int


class JobStore:
    """The only SQL of the service. Each method is one transaction.

    Raises:
        Unavailable: the database does not answer, from any method.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        # Both have ON CONFLICT, alike and under two types. Imported is the one that is used.
        dialect = import_module(f"sqlalchemy.dialects.{engine.dialect.name}")
        self._insert: Any = dialect.insert

    async def submit(self, job: Job, *, traceparent: str, max_waiting: int) -> Job:
        """Adds a job and its outbox row; returns the job that has the id now, old or new.

        Raises:
            QueueFullError: so many jobs wait already.
        """
        async with transaction(self._engine) as connection:
            existing = await _read(connection, jobs.c.job_id == job.job_id)
            if existing is not None:
                return existing
            if await _count_waiting(connection, max_waiting) >= max_waiting:
                raise QueueFullError
            insert = self._insert(jobs).values(_row(job)).on_conflict_do_nothing()
            added = await connection.execute(insert.returning(jobs.c.job_id))
            if added.first() is not None:
                await connection.execute(
                    sa.insert(outbox).values(
                        job_id=job.job_id,
                        traceparent=traceparent,
                        create_time=job.create_time,
                        publish_count=0,
                    )
                )
                return job
            # Another replica took the id between our two statements.
            winner = await _read(connection, jobs.c.job_id == job.job_id)
        assert winner is not None  # noqa: S101  # jobs are never deleted
        return winner

    async def get(self, job_id: str, *, tenant: str) -> Job | None:
        """Returns a job of a tenant, or None if it has no such job."""
        async with snapshot(self._engine) as connection:
            return await _read(connection, jobs.c.job_id == job_id, jobs.c.tenant == tenant)

    async def apply(self, job_id: str, step: Step) -> Job | None:
        """Takes a job one step on; returns it as it is then, or None if nothing changed.

        Steps of one job never run at the same time, whichever replica takes them.
        """
        async with transaction(self._engine) as connection:
            job = await _read(connection, jobs.c.job_id == job_id, lock=True)
            changed = None if job is None else step(job)
            if changed is None:
                return None
            update = sa.update(jobs).where(jobs.c.job_id == job_id).values(_progress(changed))
            await connection.execute(update)
            if changed.state.terminal:
                await connection.execute(sa.delete(outbox).where(outbox.c.job_id == job_id))
            return changed

    async def unsent(self, *, limit: int) -> list[OutboxJob]:
        """Returns jobs to publish, those that have waited longest first."""
        query = (
            sa.select(jobs, outbox.c.traceparent, outbox.c.publish_count)
            .join_from(outbox, jobs)
            .where(outbox.c.publish_time.is_(None))
            .order_by(outbox.c.create_time)
            .limit(limit)
        )
        async with snapshot(self._engine) as connection:
            return [
                OutboxJob(_job(row), row.traceparent, row.publish_count)
                for row in await connection.execute(query)
            ]

    async def mark_sent(self, sent: Sequence[OutboxJob], now: datetime) -> None:
        """Notes that messages are on the bus. A replica may have noted the same."""
        async with transaction(self._engine) as connection:
            for item in sent:
                await connection.execute(
                    sa.update(outbox)
                    .where(
                        outbox.c.job_id == item.job.job_id,
                        outbox.c.publish_count == item.publish_count,
                    )
                    .values(publish_time=now, publish_count=item.publish_count + 1)
                )

    async def lost(
        self, *, published_before: datetime, unchanged_since: datetime, limit: int
    ) -> list[UnackedJob]:
        """Returns jobs that were published before one time and did not change since another."""
        query = (
            sa.select(outbox.c.job_id, outbox.c.publish_count)
            .join_from(outbox, jobs)
            .where(
                outbox.c.publish_time < published_before,
                jobs.c.update_time < unchanged_since,
            )
            .order_by(outbox.c.publish_time)
            .limit(limit)
        )
        async with snapshot(self._engine) as connection:
            return [
                UnackedJob(row.job_id, row.publish_count) for row in await connection.execute(query)
            ]

    async def publish_again(self, lost: UnackedJob) -> None:
        """Puts a job back among those to publish, unless that has happened since it was read."""
        async with transaction(self._engine) as connection:
            await connection.execute(
                sa.update(outbox)
                .where(
                    outbox.c.job_id == lost.job_id,
                    outbox.c.publish_count == lost.publish_count,
                )
                .values(publish_time=None)
            )

    async def count_waiting(self, *, limit: int) -> int:
        """Returns how many jobs wait; counts to `limit`."""
        async with snapshot(self._engine) as connection:
            return await _count_waiting(connection, limit)


async def _read(
    connection: AsyncConnection, *conditions: sa.ColumnElement[bool], lock: bool = False
) -> Job | None:
    query = sa.select(jobs).where(*conditions)
    if lock:  # SQLite leaves it out: there the whole transaction has the lock
        query = query.with_for_update()
    row = (await connection.execute(query)).one_or_none()
    return None if row is None else _job(row)


async def _count_waiting(connection: AsyncConnection, limit: int) -> int:
    some = sa.select(jobs.c.job_id).where(jobs.c.state == State.QUEUED).limit(limit).subquery()
    return int(
        (await connection.execute(sa.select(sa.func.count()).select_from(some))).scalar_one()
    )


def _row(job: Job) -> dict[str, Any]:
    return {
        "job_id": job.job_id,
        "tenant": job.tenant,
        "user": job.user,
        "create_time": job.create_time,
        "payload": job.payload,
        **_progress(job),
    }


def _progress(job: Job) -> dict[str, Any]:
    """What changes as a job goes on."""
    failure = job.failure
    return {
        "state": int(job.state),
        "attempt_count": job.attempt_count,
        "update_time": job.update_time,
        "failure_code": failure.code if failure else None,
        "failure_reason": failure.reason if failure else None,
        "failure_message": failure.message if failure else None,
        "result": job.result,
    }


def _job(row: sa.Row[Any]) -> Job:
    return Job(
        job_id=row.job_id,
        tenant=row.tenant,
        user=row.user,
        state=State(row.state),
        attempt_count=row.attempt_count,
        create_time=row.create_time,
        update_time=row.update_time,
        failure=(
            Failure(row.failure_code, row.failure_reason, row.failure_message)
            if row.failure_code is not None
            else None
        ),
        payload=row.payload,
        result=row.result,
    )
