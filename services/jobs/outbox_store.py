"""The outbox, in SQL: which jobs are to be published, and when they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import cast

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from libs.db import snapshot, transaction
from services.jobs.tables import jobs, messages, outbox, upsert_of


@dataclass(frozen=True, kw_only=True)
class OutboxJob:
    """A job whose message is to be published.

    Attributes:
        job_id: the job.
        tenant: who submitted it.
        user: who submitted it.
        payload: a serialised `JobPayload`, not parsed: it may be broken.
        create_time: when it was accepted.
        traceparent: of the trace in which it was submitted, or empty.
        publish_count: how often it was published before.
    """

    job_id: str
    tenant: str
    user: str
    payload: bytes
    create_time: datetime
    traceparent: str
    publish_count: int


@dataclass(frozen=True)
class UnackedJob:
    """A job whose message may have been lost; it was published `publish_count` times."""

    job_id: str
    publish_count: int


class OutboxStore:
    """Reads and writes the outbox. Each method is one transaction.

    Raises:
        Unavailable: the database does not answer, from any method.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._insert = upsert_of(engine)

    async def unsent(self, *, limit: int) -> list[OutboxJob]:
        """Returns jobs to publish, those that have waited longest first."""
        query = (
            sa.select(
                outbox.c.job_id,
                jobs.c.tenant,
                jobs.c.user,
                jobs.c.payload,
                outbox.c.create_time,
                outbox.c.traceparent,
                outbox.c.publish_count,
            )
            .join_from(outbox, jobs)
            .where(outbox.c.publish_time.is_(None))
            .order_by(outbox.c.create_time)
            .limit(limit)
        )
        async with snapshot(self._engine) as connection:
            rows = (await connection.execute(query)).mappings()
            return [OutboxJob(**{str(key): value for key, value in row.items()}) for row in rows]

    async def mark_sent(
        self, sent: Sequence[OutboxJob], now: datetime, *, sequences: Mapping[str, int]
    ) -> None:
        """Notes that publishing was tried. A replica may have noted the same.

        Args:
            sent: the jobs.
            now: the time.
            sequences: the numbers of their messages in the stream, by job, of those that it stored.
        """
        async with transaction(self._engine) as connection:
            for item in sent:
                await connection.execute(
                    _of_count(item.job_id, item.publish_count)
                    .where(outbox.c.create_time == item.create_time)
                    .values(publish_time=now, publish_count=item.publish_count + 1)
                )
                if item.job_id in sequences:
                    await connection.execute(self._record(item, sequences[item.job_id]))

    def _record(self, item: OutboxJob, sequence: int) -> sa.Executable:
        """Records where the message of a job is, if the job was not deleted meanwhile."""
        job = sa.select(jobs.c.job_id, sa.literal(sequence)).where(
            jobs.c.job_id == item.job_id, jobs.c.create_time == item.create_time
        )
        insert = self._insert(messages).from_select(["job_id", "sequence"], job)
        return cast(
            "sa.Executable",
            insert.on_conflict_do_update(index_elements=["job_id"], set_={"sequence": sequence}),
        )

    async def postpone(self, lost: UnackedJob, now: datetime) -> None:
        """Lets a job that cannot be processed wait as if it were published now.

        `lost` returns it later; until then it delays no other job.
        """
        async with transaction(self._engine) as connection:
            await connection.execute(
                _of_count(lost.job_id, lost.publish_count).values(publish_time=now)
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
        """Makes a job one to publish again, unless that was done since it was read."""
        async with transaction(self._engine) as connection:
            await connection.execute(
                _of_count(lost.job_id, lost.publish_count).values(publish_time=None)
            )


def _of_count(job_id: str, publish_count: int) -> sa.Update:
    """Returns an update of a row that was not published since it was read."""
    return sa.update(outbox).where(
        outbox.c.job_id == job_id, outbox.c.publish_count == publish_count
    )
