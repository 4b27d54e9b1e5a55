"""The jobs service in outages: killed, without its bus, with a bus that lost its messages."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from headrace.jobs.v1 import jobs_pb2

from services.jobs.outbox import BATCH_JOBS
from tests.support.jobs import (
    FAILED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    Bus,
    JobClient,
    answer_of,
    generation,
    id_of,
    job_bus,
    reason_of,
    result,
)
from tests.support.nats import NatsServer, running_nats
from tests.support.service import RunningService, running_service

pytestmark = pytest.mark.integration

# Short, so that tests are quick: a job that has not changed for a second may be lost.
IMPATIENT: dict[str, Any] = {
    "HEADRACE_RECONCILE_SECONDS": "0.2",
    "HEADRACE_JOB_LOST_AFTER_SECONDS": "1",
    "HEADRACE_MAX_JOB_PUBLISHES": "2",
}


@pytest.fixture
async def nats(tmp_path: Path) -> AsyncIterator[NatsServer]:
    folder = tmp_path / "nats"
    folder.mkdir()
    async with running_nats(folder) as server:
        yield server


@pytest.fixture
async def bus(nats: NatsServer) -> AsyncIterator[Bus]:
    async with job_bus(nats.url) as made:
        yield made


@pytest.fixture
async def jobs(nats: NatsServer, tmp_path: Path) -> AsyncIterator[RunningService]:
    home = tmp_path / "home"
    home.mkdir()
    async with running_service("jobs", home, HEADRACE_NATS_URL=nats.url, **IMPATIENT) as service:
        yield service


@pytest.fixture
async def client(jobs: RunningService) -> AsyncIterator[JobClient]:
    async with jobs.channel() as channel:
        yield JobClient(channel)


async def messages(bus: Bus) -> Counter[str]:
    """How often each job is in the stream."""
    return Counter(event.job_id for _, event in await bus.submitted())


async def test_jobs_are_accepted_while_the_bus_is_away(
    client: JobClient, bus: Bus, nats: NatsServer, jobs: RunningService
) -> None:
    """They wait in the outbox, through a crash, and reach the bus once it is back; each once."""
    await nats.kill()
    accepted = [await client.submit(generation(str(number))) for number in range(20)]
    await jobs.kill()
    await nats.start()
    await jobs.start()
    for job in accepted:
        await bus.message_of(job)
    assert await messages(bus) == Counter(id_of(job) for job in accepted)
    assert [(await client.get(job.name)).state for job in accepted] == [QUEUED] * 20


async def test_killed_while_jobs_come_in_it_loses_none_that_it_accepted(
    client: JobClient, bus: Bus, jobs: RunningService
) -> None:
    """Killed -9 three times during submissions; each accepted job is on the bus, once."""
    accepted = []
    refused = 0
    stop = asyncio.Event()

    async def submit_on() -> None:
        nonlocal refused
        while not stop.is_set():
            try:
                accepted.append(await client.submit(generation()))
            except grpc.aio.AioRpcError:
                refused += 1
                await asyncio.sleep(0.05)

    submitting = [asyncio.create_task(submit_on()) for _ in range(4)]
    for _ in range(3):
        await asyncio.sleep(0.3)
        await jobs.kill()
        await jobs.start()
    stop.set()
    await asyncio.gather(*submitting)
    assert accepted
    assert refused
    async with jobs.channel() as channel:
        for job in accepted:
            assert (await JobClient(channel).get(job.name)).state == QUEUED
            await bus.message_of(job)
    # Submissions that were interrupted may have been accepted, too; none is there twice.
    assert set((await messages(bus)).values()) == {1}


async def test_outcomes_wait_for_a_service_that_is_away(
    client: JobClient, bus: Bus, jobs: RunningService
) -> None:
    """Each is stored in the end, although the service is killed while it stores them."""
    accepted = [await client.submit(generation(str(number))) for number in range(60)]
    await jobs.kill()
    for job in accepted:
        await bus.started(job, 1)
        await bus.finished(job, result=result(job.name))
    await jobs.start()
    await asyncio.sleep(0.05)
    await jobs.kill()
    await jobs.start()
    for job in accepted:
        ended = await client.ended(job.name)
        assert (ended.state, answer_of(ended)) == (SUCCEEDED, job.name)


async def test_a_job_that_the_bus_lost_is_published_again(
    client: JobClient, bus: Bus, nats: NatsServer, tmp_path: Path
) -> None:
    """The bus restarts with an empty disk; the job is published from its record."""
    job = await client.submit(generation())
    await bus.message_of(job)
    await nats.kill()
    empty = tmp_path / "empty"
    empty.mkdir()
    nats.use_folder(empty)
    await nats.start()
    headers, event = await bus.message_of(job)
    assert event.payload == job.payload
    assert headers["Nats-Msg-Id"] != id_of(job)  # the bus may know the first one
    await bus.finished(job, result=result())
    assert (await client.ended(job.name)).state == SUCCEEDED


async def test_a_job_that_is_lost_again_and_again_is_given_up(client: JobClient, bus: Bus) -> None:
    """After as many times as the setting says; the job has the error."""
    job = await client.submit(generation())
    times = 0

    async def lose() -> None:
        nonlocal times
        while True:
            await bus.message_of(job)
            await bus.js.purge_stream("HEADRACE_JOBS")
            times += 1

    losing = asyncio.create_task(lose())
    ended = await client.ended(job.name)
    losing.cancel()
    assert (ended.state, reason_of(ended)) == (FAILED, "INTERNAL")
    assert "lost it 2 times" in ended.error.message
    assert times == 2


async def test_a_job_that_waits_or_runs_long_is_not_published_again(
    client: JobClient, bus: Bus
) -> None:
    """While its message is on the bus it is not lost, however old it is."""
    waiting = await client.submit(generation())
    running = await client.submit(generation())
    await bus.message_of(running)
    await bus.started(running, 1)
    await asyncio.sleep(2.5)  # several comparisons, each after more than the time to be lost
    assert await messages(bus) == {id_of(waiting): 1, id_of(running): 1}
    assert (await client.get(running.name)).state == RUNNING


async def test_a_job_whose_outcome_waits_is_not_lost(
    client: JobClient, bus: Bus, jobs: RunningService
) -> None:
    """Its message is acknowledged, and its outcome is not stored yet: it does not run again."""
    accepted = [await client.submit(generation()) for _ in range(30)]
    await bus.message_of(accepted[-1])
    await jobs.kill()
    for job in accepted:
        await bus.finished(job, result=result())
    await bus.js.purge_stream("HEADRACE_JOBS")
    await asyncio.sleep(1.2)  # longer than the time to be lost
    await jobs.start()
    for job in accepted:
        assert (await client.ended(job.name)).state == SUCCEEDED
    await asyncio.sleep(0.5)
    assert await messages(bus) == {}


async def test_a_watcher_gets_an_error_in_a_restart_and_can_watch_again(
    client: JobClient, bus: Bus, jobs: RunningService
) -> None:
    """SIGTERM ends the stream with UNAVAILABLE, not with OK."""
    job = await client.submit(generation())
    watch = client.watch(job.name)
    assert (await anext(watch)).state == QUEUED
    assert await jobs.terminate() == 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(watch)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await jobs.start()
    await bus.finished(job, result=result())
    assert (await client.ended(job.name)).state == SUCCEEDED


async def test_two_replicas_publish_and_end_each_job_once(
    client: JobClient, bus: Bus, nats: NatsServer, tmp_path: Path
) -> None:
    """On one database; a watcher at one sees the outcomes that the other stored."""
    home = tmp_path / "second"
    home.mkdir()
    database_url = f"sqlite+aiosqlite:///{tmp_path}/home/data/jobs.db"
    async with (
        running_service(
            "jobs",
            home,
            HEADRACE_NATS_URL=nats.url,
            HEADRACE_DATABASE_URL=database_url,
            HEADRACE_WATCH_POLL_SECONDS="0.1",
            **IMPATIENT,
        ) as second,
        second.channel() as channel,
    ):
        other = JobClient(channel)
        accepted = await asyncio.gather(
            *(each.submit(generation()) for each in (client, other) for _ in range(20))
        )
        for job in accepted:
            await bus.message_of(job)
        assert await messages(bus) == Counter(id_of(job) for job in accepted)
        for job in accepted:
            for attempt in range(1, 4):
                await bus.finished(job, attempt, result=result(f"attempt {attempt}"))
        for job in accepted:
            ended = await client.ended(job.name)
            assert ended.state == SUCCEEDED
            assert await other.ended(job.name) == ended


async def test_a_broken_payload_stops_no_other_job(
    client: JobClient, bus: Bus, nats: NatsServer, jobs: RunningService, tmp_path: Path
) -> None:
    """A full batch of them in front: they fail, can still be read, and the others are published."""
    await nats.kill()
    broken = [await client.submit(generation()) for _ in range(BATCH_JOBS + 1)]
    later = await client.submit(generation())
    await jobs.kill()
    with sqlite3.connect(tmp_path / "home" / "data" / "jobs.db") as database:
        ids = [(id_of(job),) for job in broken]
        database.executemany("UPDATE jobs SET payload = x'ff' WHERE job_id = ?", ids)
    await nats.start()
    await jobs.start()
    await bus.message_of(later)
    for job in broken:
        ended = await client.ended(job.name)
        assert (ended.state, reason_of(ended)) == (FAILED, "INTERNAL")
        assert not ended.HasField("payload")
    listed = await client.list(view=jobs_pb2.JOB_VIEW_FULL, filter='state = "JOB_STATE_FAILED"')
    assert len(listed.jobs) == len(broken)
    assert jobs.process.returncode is None


async def test_a_row_that_cannot_be_processed_stops_no_other_job(
    client: JobClient, bus: Bus, jobs: RunningService, tmp_path: Path
) -> None:
    """Its state is unknown and its message is lost: all other jobs go on, also other lost ones."""
    strange = await client.submit(generation())
    other = await client.submit(generation())
    for job in (strange, other):
        await bus.message_of(job)
    await jobs.kill()
    with sqlite3.connect(tmp_path / "home" / "data" / "jobs.db") as database:
        database.execute("UPDATE jobs SET state = 77 WHERE job_id = ?", (id_of(strange),))
        database.execute("UPDATE outbox SET publish_count = 2 WHERE job_id = ?", (id_of(strange),))
    await bus.js.purge_stream("HEADRACE_JOBS")
    await jobs.start()
    await bus.message_of(other)
    await bus.finished(other, result=result())
    assert (await client.ended(other.name)).state == SUCCEEDED
    assert "lost job not recovered" in jobs.log.read_text()
    assert jobs.process.returncode is None
