"""Job records on both databases, with replicas that write at the same time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from libs.db import create_engine, migrate
from services.jobs.domain import Failure, Finished, Job, Outcome, Started, State, Step, advance
from services.jobs.store import JobStore, QueueFullError, UnackedJob
from services.jobs.tables import metadata
from tests.support.databases import DATABASES, empty_database, shared_postgres

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

START = datetime(2026, 11, 1, tzinfo=UTC)
FAILURE = Failure("NOT_FOUND", "MODEL_NOT_FOUND", "no such model")


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
    return lambda job: advance(job, outcome, START + timedelta(days=1))


async def test_the_tables_are_those_that_the_code_knows(
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
    assert await store.submit(wanted, traceparent="00-a", max_waiting=10) is wanted
    for outcome in (Started(1), Started(2), Finished(2, result=bytes(range(256)))):
        changed = await store.apply(wanted.job_id, step(outcome))
        assert changed is not None
        assert changed == await store.get(wanted.job_id, tenant="acme")
    ended = await store.get(wanted.job_id, tenant="acme")
    assert ended is not None
    assert (ended.state, ended.attempt_count) == (State.SUCCEEDED, 2)
    assert await store.apply(wanted.job_id, step(Finished(3, failure=FAILURE))) is None
    assert await store.get(wanted.job_id, tenant="other") is None
    assert await store.apply("unknown", step(Started(1))) is None

    failed = job(2)
    await store.submit(failed, traceparent="", max_waiting=10)
    await store.apply(failed.job_id, step(Finished(1, failure=FAILURE)))
    read = await store.get(failed.job_id, tenant="acme")
    assert read is not None
    assert (read.state, read.failure, read.result) == (State.FAILED, FAILURE, None)


async def test_replicas_that_take_the_same_job_agree(stores: tuple[JobStore, JobStore]) -> None:
    """One wins, all answer with the winner."""
    wanted = [job(number % 5, payload=str(number).encode()) for number in range(40)]
    answers = await asyncio.gather(
        *(
            stores[number % 2].submit(each, traceparent="", max_waiting=100)
            for number, each in enumerate(wanted)
        )
    )
    for number in range(5):
        payloads = {answer.payload for answer in answers if answer.job_id == f"job-{number:04}"}
        assert len(payloads) == 1
    assert len(await stores[0].unsent(limit=100)) == 5


async def test_outcomes_that_reach_both_replicas_end_a_job_once(
    stores: tuple[JobStore, JobStore],
) -> None:
    """However they race, exactly one end is taken, and nothing changes after it."""
    await stores[0].submit(job(1), traceparent="", max_waiting=10)
    outcomes: list[Outcome] = [Started(attempt) for attempt in range(1, 6)]
    outcomes += [Finished(attempt, result=b"r%d" % attempt) for attempt in range(1, 6)]
    work = [(store, outcome) for outcome in outcomes for store in stores]
    random.Random(1).shuffle(work)  # noqa: S311  # a shuffle that is the same every time
    changes = await asyncio.gather(
        *(store.apply("job-0001", step(outcome)) for store, outcome in work)
    )
    ends = [change for change in changes if change is not None and change.state.terminal]
    assert len(ends) == 1
    assert await stores[0].get("job-0001", tenant="acme") == ends[0]
    counts = [change.attempt_count for change in changes if change and not change.state.terminal]
    assert len(counts) == len(set(counts))


async def test_only_waiting_jobs_count_against_the_limit(
    stores: tuple[JobStore, JobStore],
) -> None:
    """One that runs has left the queue; one that is submitted again is not a new one."""
    store = stores[0]
    for number in range(3):
        await store.submit(job(number), traceparent="", max_waiting=3)
    with pytest.raises(QueueFullError):
        await store.submit(job(3), traceparent="", max_waiting=3)
    assert (await store.submit(job(1), traceparent="", max_waiting=3)) == job(1)
    await store.apply("job-0000", step(Started(1)))
    assert await store.count_waiting(limit=100) == 2
    assert await store.count_waiting(limit=1) == 1
    await store.submit(job(3), traceparent="", max_waiting=3)


async def test_the_outbox_holds_what_is_to_be_sent(stores: tuple[JobStore, JobStore]) -> None:
    """Oldest first, with its trace; sent once, again when lost, and never after its end."""
    store = stores[0]
    for number in (2, 1, 3):
        await store.submit(job(number), traceparent=f"trace-{number}", max_waiting=10)
    unsent = await store.unsent(limit=2)
    assert [(item.job, item.traceparent, item.publish_count) for item in unsent] == [
        (job(1), "trace-1", 0),
        (job(2), "trace-2", 0),
    ]
    sent_at = START + timedelta(hours=1)
    await asyncio.gather(*(each.mark_sent(unsent, sent_at) for each in stores))
    assert [item.job.job_id for item in await store.unsent(limit=10)] == ["job-0003"]

    async def lost(*, published_before: datetime = sent_at + timedelta(1)) -> list[UnackedJob]:
        return await store.lost(
            published_before=published_before, unchanged_since=sent_at, limit=10
        )

    assert await lost() == [UnackedJob("job-0001", 1), UnackedJob("job-0002", 1)]
    assert await lost(published_before=sent_at) == []
    await store.apply("job-0002", step(Started(1)))  # changed a day later
    (first,) = await lost()
    await store.publish_again(first)
    await store.publish_again(UnackedJob("job-0003", 7))  # of a time that has passed
    again = [(item.job.job_id, item.publish_count) for item in await store.unsent(limit=10)]
    assert again == [("job-0001", 1), ("job-0003", 0)]
    await store.apply("job-0001", step(Finished(1, result=b"r")))
    assert [item.job.job_id for item in await store.unsent(limit=10)] == ["job-0003"]
    assert await lost() == []
