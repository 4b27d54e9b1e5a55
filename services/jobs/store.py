"""Job records, in SQL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from libs.db import erase_log, snapshot, transaction
from libs.errors import Unavailable
from libs.rpc.paging import Page, PageRequest, invalid_page_token
from services.jobs.domain import Job, State, Step
from services.jobs.rows import (
    SIZE,
    SUMMARY,
    SUMMARY_SIZE,
    changes_of,
    job_of,
    readable_jobs,
    row_of,
)
from services.jobs.tables import jobs, messages, outbox, upsert_of

# A page of jobs ends here: together with a margin, what gRPC clients accept by default is 4 MiB.
MAX_PAGE_BYTES = 3 * 1024 * 1024
SUBMIT_TRIES = 3
RETRY_AFTER_SECONDS = 1.0

_ENDED = (State.SUCCEEDED, State.FAILED, State.CANCELLED)


class QueueFullError(Exception):
    """The maximum number of jobs waits.

    Attributes:
        limit: this maximum.
        of_tenant: whether it is that of the job's tenant.
    """

    def __init__(self, limit: int, *, of_tenant: bool) -> None:
        super().__init__(limit)
        self.limit = limit
        self.of_tenant = of_tenant


@dataclass(frozen=True)
class WaitingLimits:
    """How many jobs may wait: of all tenants together, and of one."""

    total: int
    per_tenant: int


@dataclass(frozen=True, kw_only=True)
class JobFilter:
    """Which jobs to list.

    Attributes:
        tenant: of this tenant only.
        state: in this state; None: in any.
        now: jobs that expired by then are left out.
        full: whether to read payloads and results.
    """

    tenant: str
    state: State | None = None
    now: datetime
    full: bool = False


@dataclass(frozen=True)
class DeletedJob:
    """A job that was deleted. Its last message had the number `sequence`; None: unknown."""

    job_id: str
    create_time: datetime
    sequence: int | None


class JobStore:
    """Reads and writes job records. Each method is one transaction.

    Raises:
        Unavailable: the database does not answer, from any method.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._insert = upsert_of(engine)

    async def submit(self, job: Job, *, traceparent: str, limits: WaitingLimits) -> Job:
        """Adds a job and its outbox row; returns the job that has the id now, old or new.

        An expired job that has the same id is replaced.

        Raises:
            QueueFullError: as many jobs as may wait do, of all tenants or of this one.
        """
        for _ in range(SUBMIT_TRIES):
            async with transaction(self._engine) as connection:
                stored = await self._submit(connection, job, traceparent, limits)
            if stored is not None:
                return stored
        raise Unavailable(
            f"{job.name} changes too often",
            reason="DEPENDENCY_UNAVAILABLE",
            metadata={"dependency": self._engine.url.get_backend_name()},
            retry_after_seconds=RETRY_AFTER_SECONDS,
        )

    async def _submit(
        self, connection: AsyncConnection, job: Job, traceparent: str, limits: WaitingLimits
    ) -> Job | None:
        """Returns the stored job, or None if another replica deleted it meanwhile: try again."""
        has_id = jobs.c.job_id == job.job_id
        existing = await _read(connection, has_id)
        if existing is not None:
            if not existing.is_expired(job.create_time):
                return existing
            expired = jobs.c.expire_time <= job.create_time
            await connection.execute(sa.delete(jobs).where(has_id, expired))
        await _check_waiting(connection, job.tenant, limits)
        insert = self._insert(jobs).values(row_of(job)).on_conflict_do_nothing()
        added = await connection.execute(insert.returning(jobs.c.job_id))
        if added.first() is None:  # another replica added it since `existing` was read
            return await _read(connection, has_id)
        await connection.execute(
            sa.insert(outbox).values(
                job_id=job.job_id,
                traceparent=traceparent,
                create_time=job.create_time,
                publish_count=0,
            )
        )
        return job

    async def get(
        self, job_id: str, *, tenant: str, now: datetime, full: bool = True
    ) -> Job | None:
        """Returns a job of a tenant, or None if there is none or it has expired.

        Args:
            job_id: its id.
            tenant: who must own it.
            now: the time.
            full: whether to read payload and result.
        """
        async with snapshot(self._engine) as connection:
            job = await _read(
                connection, jobs.c.job_id == job_id, jobs.c.tenant == tenant, full=full
            )
        return None if job is None or job.is_expired(now) else job

    async def list(self, wanted: JobFilter, page: PageRequest) -> Page[Job]:
        """Returns a page of jobs, the newest first. It ends early at `MAX_PAGE_BYTES`.

        Raises:
            InvalidArgument: the page token is invalid.
        """
        size = SIZE if wanted.full else SUMMARY_SIZE
        query: sa.Select[Any] = (
            sa.select(*SUMMARY, size.label("size_bytes"))
            .where(*_conditions(wanted, page))
            .order_by(jobs.c.create_time.desc(), jobs.c.job_id.desc())
            .limit(page.limit)
        )
        async with snapshot(self._engine) as connection:
            rows: Sequence[sa.Row[Any]] = (await connection.execute(query)).all()
            cut = Page.of(rows, _within_limit(rows, page), key=_page_key)
            listed = readable_jobs(cut.rows)
            if wanted.full:
                listed = await _with_contents(connection, listed)
        return Page(listed, cut.next_page_token)

    async def apply(self, job_id: str, step: Step) -> Job | None:
        """Changes a job by one step; returns the changed job, or None if nothing changed.

        Steps of one job never run at the same time, whichever replica takes them.
        """
        async with transaction(self._engine) as connection:
            job = await _read(connection, jobs.c.job_id == job_id, lock=True)
            changed = None if job is None else step(job)
            if changed is None:
                return None
            update = sa.update(jobs).where(jobs.c.job_id == job_id).values(changes_of(changed))
            await connection.execute(update)
            if changed.state.terminal:
                await connection.execute(sa.delete(outbox).where(outbox.c.job_id == job_id))
            return changed

    async def delete(
        self, job_id: str, *, tenant: str, now: datetime
    ) -> tuple[Job, DeletedJob] | None:
        """Deletes a job of a tenant, ended or not; None if there is none or it has expired.

        The returned job has neither payload nor result.
        """
        wanted = (jobs.c.job_id == job_id, jobs.c.tenant == tenant)
        async with transaction(self._engine) as connection:
            job = await _read(connection, *wanted, full=False, lock=True)
            if job is None or job.is_expired(now):
                return None
            sequences = await _delete(connection, [job_id])
        return job, DeletedJob(job_id, job.create_time, sequences.get(job_id))

    async def delete_expired(self, now: datetime, *, limit: int) -> Sequence[DeletedJob]:
        """Deletes jobs that expired by then and returns them, at most `limit`.

        Replicas may delete at the same time: they skip the rows of each other.
        """
        expired = (
            sa.select(jobs.c.job_id, jobs.c.create_time)
            .where(jobs.c.expire_time <= now)
            .order_by(jobs.c.expire_time)
            .limit(limit)
            .with_for_update(skip_locked=True)  # SQLite has one writer and leaves it out
        )
        async with transaction(self._engine) as connection:
            rows = (await connection.execute(expired)).all()
            sequences = await _delete(connection, [row.job_id for row in rows])
        return [DeletedJob(row.job_id, row.create_time, sequences.get(row.job_id)) for row in rows]

    async def erase_log(self) -> bool:
        """Removes what was deleted from the database's log; returns whether that is done."""
        return await erase_log(self._engine)

    async def fill_in_expire_times(self, retention: timedelta, *, limit: int) -> int:
        """Sets `expire_time` of jobs that ended under an earlier version; returns how many."""
        missing = (
            sa.select(jobs.c.job_id, jobs.c.update_time)
            .where(jobs.c.expire_time.is_(None), jobs.c.state.in_(_ENDED))
            .limit(limit)
        )
        async with transaction(self._engine) as connection:
            rows = (await connection.execute(missing)).all()
            for row in rows:
                await connection.execute(
                    sa.update(jobs)
                    .where(jobs.c.job_id == row.job_id)
                    .values(expire_time=row.update_time + retention)
                )
        return len(rows)

    async def count_waiting(self, *, limit: int) -> int:
        """Returns how many jobs wait, at most `limit`."""
        async with snapshot(self._engine) as connection:
            return await _count_waiting(connection, limit)


async def _read(
    connection: AsyncConnection,
    *conditions: sa.ColumnElement[bool],
    full: bool = True,
    lock: bool = False,
) -> Job | None:
    query = sa.select(*(jobs.columns if full else SUMMARY)).where(*conditions)
    if lock:  # SQLite leaves it out: there the transaction has the lock of the database
        query = query.with_for_update()
    row = (await connection.execute(query)).one_or_none()
    return None if row is None else job_of(row)


async def _delete(connection: AsyncConnection, job_ids: Sequence[str]) -> dict[str, int]:
    """Deletes jobs with all that belongs to them; returns the numbers of their messages."""
    if not job_ids:
        return {}
    sequences = sa.select(messages).where(messages.c.job_id.in_(job_ids))
    found = {row.job_id: row.sequence for row in await connection.execute(sequences)}
    await connection.execute(sa.delete(outbox).where(outbox.c.job_id.in_(job_ids)))
    await connection.execute(sa.delete(jobs).where(jobs.c.job_id.in_(job_ids)))
    return found


async def _count_waiting(connection: AsyncConnection, limit: int) -> int:
    some = sa.select(jobs.c.job_id).where(jobs.c.state == State.QUEUED).limit(limit).subquery()
    return int(
        (await connection.execute(sa.select(sa.func.count()).select_from(some))).scalar_one()
    )


async def _check_waiting(connection: AsyncConnection, tenant: str, limits: WaitingLimits) -> None:
    waiting = await _count_waiting(connection, limits.total)
    if waiting >= limits.total:
        raise QueueFullError(limits.total, of_tenant=False)
    if waiting < limits.per_tenant:
        return
    # The limit inside makes the database read the jobs that wait, not all jobs of the tenant.
    some = sa.select(jobs.c.tenant).where(jobs.c.state == State.QUEUED).limit(limits.total)
    of_all = some.subquery()
    count = sa.select(sa.func.count()).select_from(of_all).where(of_all.c.tenant == tenant)
    if (await connection.execute(count)).scalar_one() >= limits.per_tenant:
        raise QueueFullError(limits.per_tenant, of_tenant=True)


async def _with_contents(connection: AsyncConnection, listed: Sequence[Job]) -> list[Job]:
    """Returns the jobs with their payloads and results."""
    query = sa.select(jobs.c.job_id, jobs.c.payload, jobs.c.result).where(
        jobs.c.job_id.in_([job.job_id for job in listed])
    )
    rows = {row.job_id: row for row in await connection.execute(query)}
    return [
        replace(job, payload=rows[job.job_id].payload, result=rows[job.job_id].result)
        for job in listed
    ]


def _conditions(wanted: JobFilter, page: PageRequest) -> list[sa.ColumnElement[bool]]:
    conditions = [
        jobs.c.tenant == wanted.tenant,
        sa.or_(jobs.c.expire_time.is_(None), jobs.c.expire_time > wanted.now),
    ]
    if wanted.state is not None:
        conditions.append(jobs.c.state == wanted.state)
    if page.after:
        moment, job_id = _parse_page_key(page.after)
        # The first condition alone can use the index.
        conditions.append(jobs.c.create_time <= moment)
        conditions.append(sa.or_(jobs.c.create_time < moment, jobs.c.job_id < job_id))
    return conditions


def _within_limit(rows: Sequence[sa.Row[Any]], page: PageRequest) -> PageRequest:
    """Returns the page with as many jobs as fit into a message, but at least one."""
    total_bytes = 0
    for index, row in enumerate(rows[: page.size]):
        total_bytes += row.size_bytes
        if total_bytes > MAX_PAGE_BYTES and index:
            return replace(page, size=index)
    return page


def _page_key(row: sa.Row[Any]) -> str:
    return f"{row.create_time.isoformat()} {row.job_id}"


def _parse_page_key(key: str) -> tuple[datetime, str]:
    stamp, _, job_id = key.partition(" ")
    try:
        moment = datetime.fromisoformat(stamp)
    except ValueError as error:
        raise invalid_page_token() from error
    if moment.tzinfo is None or not job_id:
        raise invalid_page_token()
    return moment, job_id
