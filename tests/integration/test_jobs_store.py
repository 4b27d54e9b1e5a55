"""Job records and the outbox on both databases, with replicas that write at the same time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from libs.db import create_engine, migrate
from libs.errors import InvalidArgument
from libs.rpc.paging import PageRequest
from services.jobs.domain import Finished, Outcome, Started, State, cancel
from services.jobs.outbox_store import OutboxStore, UnackedJob
from services.jobs.store import (
    MAX_PAGE_BYTES,
    DeletedJob,
    JobFilter,
    JobStore,
    QueueFullError,
    WaitingLimits,
)
from services.jobs.tables import jobs, metadata
from tests.support.databases import DATABASES, empty_database, shared_postgres
from tests.support.job_records import LATER, RETENTION, START, job, step

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

ERROR = b"a serialised status"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def postgres_url() -> AsyncIterator[str]:
    async with shared_postgres() as server_url:
        yield server_url


@pytest_asyncio.fixture(loop_scope="module", params=DATABASES)
async def url(request: pytest.FixtureRequest, postgres_url: str, tmp_path: Path) -> str:
    return await empty_database(request.param, folder=tmp_path, postgres_url=postgres_url)


@pytest_asyncio.fixture(loop_scope="module")
async def engines(url: str) -> AsyncIterator[tuple[AsyncEngine, AsyncEngine]]:
    await migrate(url, "jobs")
    made = create_engine(url), create_engine(url)
    yield made
    for engine in made:
        await engine.dispose()


@pytest_asyncio.fixture(loop_scope="module")
async def stores(engines: tuple[AsyncEngine, AsyncEngine]) -> tuple[JobStore, JobStore]:
    return JobStore(engines[0]), JobStore(engines[1])


@pytest_asyncio.fixture(loop_scope="module")
async def outboxes(engines: tuple[AsyncEngine, AsyncEngine]) -> tuple[OutboxStore, OutboxStore]:
    return OutboxStore(engines[0]), OutboxStore(engines[1])


async def test_the_tables_are_those_in_the_code(
    engines: tuple[AsyncEngine, AsyncEngine],
) -> None:
    """The migrations lead to `tables.py`: same tables, columns and indices."""

    def differences(connection: sa.Connection) -> list[str]:
        found = sa.inspect(connection)
        return [
            table.name
            for table in metadata.sorted_tables
            if {column["name"] for column in found.get_columns(table.name)}
            != {column.name for column in table.columns}
            or {index["name"] for index in found.get_indexes(table.name)}
            != {index.name for index in table.indexes}
        ]

    async with engines[0].connect() as connection:
        assert await connection.run_sync(differences) == []


async def test_a_job_is_kept_as_it_is(stores: tuple[JobStore, JobStore]) -> None:
    """Through all its states, byte for byte; for its own tenant."""
    store = stores[0]
    wanted = job(1, payload=bytes(range(256)))
    assert await store.submit(wanted, traceparent="00-a", limits=WaitingLimits(10, 10)) is wanted
    for outcome in (Started(1), Started(2), Finished(2, result=bytes(range(256)))):
        changed = await store.apply(wanted.job_id, step(outcome))
        assert changed is not None
        assert changed == await store.get(wanted.job_id, tenant="acme", now=LATER)
    ended = await store.get(wanted.job_id, tenant="acme", now=LATER)
    assert ended is not None
    assert (ended.state, ended.attempt_count) == (State.SUCCEEDED, 2)
    assert await store.apply(wanted.job_id, step(Finished(3, error=ERROR))) is None
    assert await store.get(wanted.job_id, tenant="other", now=LATER) is None
    assert await store.apply("unknown", step(Started(1))) is None

    failed = job(2)
    await store.submit(failed, traceparent="", limits=WaitingLimits(10, 10))
    await store.apply(failed.job_id, step(Finished(1, error=ERROR)))
    read = await store.get(failed.job_id, tenant="acme", now=LATER)
    assert read is not None
    assert (read.state, read.error, read.result) == (State.FAILED, ERROR, None)
    summary = await store.get(failed.job_id, tenant="acme", now=LATER, full=False)
    assert summary == replace(read, payload=b"")


async def test_replicas_that_accept_the_same_job_agree(
    stores: tuple[JobStore, JobStore], outboxes: tuple[OutboxStore, OutboxStore]
) -> None:
    """One wins, all return its job."""
    wanted = [job(number % 5, payload=str(number).encode()) for number in range(40)]
    answers = await asyncio.gather(
        *(
            stores[number % 2].submit(each, traceparent="", limits=WaitingLimits(100, 100))
            for number, each in enumerate(wanted)
        )
    )
    for number in range(5):
        payloads = {answer.payload for answer in answers if answer.job_id == f"job-{number:04}"}
        assert len(payloads) == 1
    assert len(await outboxes[0].unsent(limit=100)) == 5


async def test_outcomes_that_reach_both_replicas_end_a_job_once(
    stores: tuple[JobStore, JobStore],
) -> None:
    """In whatever order, exactly one end is stored, and nothing changes after it."""
    await stores[0].submit(job(1), traceparent="", limits=WaitingLimits(10, 10))
    outcomes: list[Outcome] = [Started(attempt) for attempt in range(1, 6)]
    outcomes += [Finished(attempt, result=b"r%d" % attempt) for attempt in range(1, 6)]
    work = [(store, outcome) for outcome in outcomes for store in stores]
    random.Random(1).shuffle(work)  # noqa: S311  # a shuffle that is the same every time
    changes = await asyncio.gather(
        *(store.apply("job-0001", step(outcome)) for store, outcome in work)
    )
    ends = [change for change in changes if change is not None and change.state.terminal]
    assert len(ends) == 1
    assert await stores[0].get("job-0001", tenant="acme", now=LATER) == ends[0]
    counts = [change.attempt_count for change in changes if change and not change.state.terminal]
    assert len(counts) == len(set(counts))


async def test_only_waiting_jobs_count_against_the_limit(
    stores: tuple[JobStore, JobStore],
) -> None:
    """One that runs has left the queue; one that is submitted again is not a new one."""
    store = stores[0]
    for number in range(3):
        await store.submit(job(number), traceparent="", limits=WaitingLimits(3, 3))
    with pytest.raises(QueueFullError):
        await store.submit(job(3), traceparent="", limits=WaitingLimits(3, 3))
    assert (await store.submit(job(1), traceparent="", limits=WaitingLimits(3, 3))) == job(1)
    await store.apply("job-0000", step(Started(1)))
    assert await store.count_waiting(limit=100) == 2
    assert await store.count_waiting(limit=1) == 1
    await store.submit(job(3), traceparent="", limits=WaitingLimits(3, 3))


async def test_the_outbox_has_the_jobs_to_publish(
    stores: tuple[JobStore, JobStore], outboxes: tuple[OutboxStore, OutboxStore]
) -> None:
    """Oldest first, with its trace; sent once, again when lost, and never after its end."""
    store, outbox = stores[0], outboxes[0]
    for number in (2, 1, 3):
        await store.submit(job(number), traceparent=f"trace-{number}", limits=WaitingLimits(10, 10))
    unsent = await outbox.unsent(limit=2)
    assert [
        (item.job_id, item.payload, item.create_time, item.traceparent, item.publish_count)
        for item in unsent
    ] == [
        ("job-0001", b"p", START + timedelta(seconds=1), "trace-1", 0),
        ("job-0002", b"p", START + timedelta(seconds=2), "trace-2", 0),
    ]
    sent_at = START + timedelta(hours=1)
    await asyncio.gather(*(each.mark_sent(unsent, sent_at, sequences={}) for each in outboxes))
    assert [item.job_id for item in await outbox.unsent(limit=10)] == ["job-0003"]

    async def lost(*, published_before: datetime = sent_at + timedelta(1)) -> list[UnackedJob]:
        return await outbox.lost(
            published_before=published_before, unchanged_since=sent_at, limit=10
        )

    assert await lost() == [UnackedJob("job-0001", 1), UnackedJob("job-0002", 1)]
    assert await lost(published_before=sent_at) == []
    await store.apply("job-0002", step(Started(1)))  # changed a day later
    (first,) = await lost()
    await outbox.publish_again(first)
    await outbox.publish_again(UnackedJob("job-0003", 7))  # read at another time
    again = [(item.job_id, item.publish_count) for item in await outbox.unsent(limit=10)]
    assert again == [("job-0001", 1), ("job-0003", 0)]
    await store.apply("job-0001", step(Finished(1, result=b"r")))
    assert [item.job_id for item in await outbox.unsent(limit=10)] == ["job-0003"]
    assert await lost() == []


async def test_a_job_that_cannot_be_recovered_waits_as_if_it_were_published(
    stores: tuple[JobStore, JobStore], outboxes: tuple[OutboxStore, OutboxStore]
) -> None:
    """It is looked at again later, and does not stay the first of those that are lost."""
    outbox = outboxes[0]
    for number in range(2):
        await stores[0].submit(job(number), traceparent="", limits=WaitingLimits(10, 10))
    await outbox.mark_sent(await outbox.unsent(limit=10), LATER, sequences={})
    day = timedelta(days=1)

    async def lost(*, published_before: datetime) -> list[str]:
        found = await outbox.lost(
            published_before=published_before, unchanged_since=LATER, limit=10
        )
        return [each.job_id for each in found]

    assert await lost(published_before=LATER + day) == ["job-0000", "job-0001"]
    await outbox.postpone(UnackedJob("job-0000", 1), LATER + day)
    assert await lost(published_before=LATER + day) == ["job-0001"]
    assert await lost(published_before=LATER + 2 * day) == ["job-0001", "job-0000"]


def all_jobs(tenant: str = "acme", **fields: object) -> JobFilter:
    return JobFilter(**{"tenant": tenant, "now": LATER, **fields})  # type: ignore[arg-type]  # as given


async def listed(store: JobStore, wanted: JobFilter, page_size: int) -> list[list[str]]:
    """Returns the ids on each page."""
    pages = []
    token = ""
    while True:
        page = await store.list(wanted, PageRequest.parse(page_size, token))
        pages.append([each.job_id for each in page.rows])
        token = page.next_page_token
        if not token:
            return pages


async def test_jobs_are_listed_by_time_and_id(stores: tuple[JobStore, JobStore]) -> None:
    """The newest first; those of one moment by their ids, also where a page ends between them."""
    store = stores[0]
    for number in range(4):
        same_time = replace(job(7), job_id=f"same-{number}")
        await store.submit(same_time, traceparent="", limits=WaitingLimits(100, 100))
    for number in (3, 9):
        await store.submit(job(number), traceparent="", limits=WaitingLimits(100, 100))
    await store.submit(
        replace(job(5), tenant="other"), traceparent="", limits=WaitingLimits(100, 100)
    )
    order = ["job-0009", "same-3", "same-2", "same-1", "same-0", "job-0003"]
    for size in (1, 2, 3, 5, 6, 7):
        pages = await listed(store, all_jobs(), size)
        assert [each for page in pages for each in page] == order
        assert all(len(page) == size for page in pages[:-1])
    assert await listed(store, all_jobs("other"), 10) == [["job-0005"]]
    with pytest.raises(InvalidArgument):
        await store.list(all_jobs(), PageRequest(10, "yesterday job-0003"))


async def test_lists_have_states_and_leave_out_expired_jobs(
    stores: tuple[JobStore, JobStore],
) -> None:
    """Whether they are deleted or not."""
    store = stores[0]
    for number in range(4):
        await store.submit(job(number), traceparent="", limits=WaitingLimits(100, 100))
    await store.apply("job-0000", step(Started(1)))
    await store.apply("job-0001", step(Finished(1, error=ERROR)))
    await store.apply("job-0002", lambda each: cancel(each, now=LATER, retention=RETENTION))
    for number, state in enumerate((State.RUNNING, State.FAILED, State.CANCELLED, State.QUEUED)):
        found = await listed(store, all_jobs(state=state), 10)
        assert found == [[f"job-{number:04}"]]
    after = all_jobs(now=LATER + RETENTION)
    assert await listed(store, after, 10) == [["job-0003", "job-0000"]]
    for number, kept in enumerate((True, False, False, True)):
        read = await store.get(f"job-{number:04}", tenant="acme", now=after.now)
        assert (read is not None) is kept


async def test_a_page_ends_before_it_is_too_large(stores: tuple[JobStore, JobStore]) -> None:
    """By what it has to return: payloads and results count only where they are read."""
    store = stores[0]
    large = bytes(MAX_PAGE_BYTES // 2)
    for number in range(4):
        await store.submit(
            job(number, payload=large), traceparent="", limits=WaitingLimits(100, 100)
        )
    await store.apply("job-0002", step(Finished(1, result=2 * large)))
    pages = await listed(store, all_jobs(full=True), 10)
    assert pages == [["job-0003"], ["job-0002"], ["job-0001"], ["job-0000"]]
    assert await listed(store, all_jobs(), 10) == [["job-0003", "job-0002", "job-0001", "job-0000"]]
    (full,) = (await store.list(all_jobs(full=True), PageRequest.parse(1, ""))).rows
    assert full == await store.get("job-0003", tenant="acme", now=LATER)
    await store.apply("job-0003", step(Finished(1, error=large)))
    await store.apply("job-0001", step(Finished(1, error=large)))
    assert await listed(store, all_jobs(), 10) == [
        ["job-0003", "job-0002"], ["job-0001", "job-0000"]
    ]  # fmt: skip


async def test_a_row_with_an_unknown_state_does_not_break_lists(
    stores: tuple[JobStore, JobStore], engines: tuple[AsyncEngine, AsyncEngine]
) -> None:
    """A later version may have written it; the others are listed."""
    store = stores[0]
    for number in range(3):
        await store.submit(job(number), traceparent="", limits=WaitingLimits(100, 100))
    async with engines[0].begin() as connection:
        await connection.execute(
            sa.update(jobs).where(jobs.c.job_id == "job-0001").values(state=77)
        )
    assert await listed(store, all_jobs(), 1) == [["job-0002"], [], ["job-0000"]]


async def test_expired_jobs_are_deleted_some_at_a_time(
    stores: tuple[JobStore, JobStore],
) -> None:
    """The oldest first, also where two replicas delete; others stay."""
    for number in range(25):
        await stores[0].submit(job(number), traceparent="", limits=WaitingLimits(100, 100))
    for number in range(20):
        await stores[0].apply(f"job-{number:04}", step(Finished(1, result=b"r")))
    expired = LATER + RETENTION
    assert await stores[0].delete_expired(expired - timedelta(seconds=1), limit=100) == []
    assert len(await stores[0].delete_expired(expired, limit=4)) == 4
    deleted = await asyncio.gather(
        *(store.delete_expired(expired, limit=5) for store in stores for _ in range(4))
    )
    deleted += await asyncio.gather(stores[0].delete_expired(expired, limit=100))
    assert sum(map(len, deleted)) == 16
    left = await listed(stores[0], all_jobs(now=START), 100)
    assert left == [[f"job-{number:04}" for number in range(24, 19, -1)]]


async def test_a_job_is_deleted_with_its_message(
    stores: tuple[JobStore, JobStore], outboxes: tuple[OutboxStore, OutboxStore]
) -> None:
    """In any state, once, by its tenant; the number of its last message is returned."""
    store, outbox = stores[0], outboxes[0]
    for number in range(3):
        await store.submit(job(number), traceparent="", limits=WaitingLimits(10, 10))
    unsent = await outbox.unsent(limit=10)
    await outbox.mark_sent(unsent, START, sequences={"job-0000": 7, "job-0001": 8})
    await outbox.mark_sent(unsent, START, sequences={"job-0001": 9})  # published again
    await store.apply("job-0001", step(Finished(1, result=b"r")))
    for number, sequence in enumerate((7, 9, None)):
        job_id = f"job-{number:04}"
        assert await store.delete(job_id, tenant="evil", now=START) is None
        answers = await asyncio.gather(
            *(each.delete(job_id, tenant="acme", now=START) for each in stores)
        )
        ((deleted, traces),) = [answer for answer in answers if answer is not None]
        assert (deleted.job_id, deleted.payload, deleted.result) == (job_id, b"", None)
        assert traces == DeletedJob(job_id, deleted.create_time, sequence)
        assert await store.get(job_id, tenant="acme", now=START) is None
    assert await outbox.unsent(limit=10) == []
    # What is noted late belongs to the job that was deleted, and not to another with its id.
    again = replace(job(0), create_time=LATER, update_time=LATER)
    assert await store.submit(again, traceparent="", limits=WaitingLimits(10, 10)) == again
    await outbox.mark_sent(unsent, LATER, sequences={"job-0000": 7})
    assert [item.create_time for item in await outbox.unsent(limit=10)] == [LATER]
    found = await store.delete("job-0000", tenant="acme", now=LATER)
    assert found is not None
    assert found[1].sequence is None


async def test_the_id_of_an_expired_job_can_be_used_again(
    stores: tuple[JobStore, JobStore], outboxes: tuple[OutboxStore, OutboxStore]
) -> None:
    """Before it is deleted, by many at the same time; the new job is to be published."""
    await stores[0].submit(job(1), traceparent="", limits=WaitingLimits(10, 10))
    await stores[0].apply("job-0001", step(Finished(1, result=b"r")))
    again = replace(
        job(1, payload=b"another"), create_time=LATER + RETENTION, update_time=LATER + RETENTION
    )
    answers = await asyncio.gather(
        *(
            store.submit(again, traceparent="", limits=WaitingLimits(10, 10))
            for store in stores
            for _ in range(5)
        )
    )
    assert answers == [again] * 10
    assert [item.payload for item in await outboxes[0].unsent(limit=10)] == [b"another"]
