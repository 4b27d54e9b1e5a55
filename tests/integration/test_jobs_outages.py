"""The jobs service on bad days: killed, without its bus, with a bus that forgets."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support.jobs import (
    FAILED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    Bus,
    JobClient,
    generation,
    id_of,
    job_bus,
    result,
)
from tests.support.nats import NatsServer, running_nats
from tests.support.service import RunningService, running_service

pytestmark = pytest.mark.integration

# Soon, so that tests need not wait: a job that has not changed for a second may be lost.
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
    """Killed -9 three times in a stream of submissions; what was answered is on the bus, once."""
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
    # Those that were cut off may have been accepted, too; none is there twice.
    assert set((await messages(bus)).values()) == {1}


async def test_outcomes_wait_for_a_service_that_is_away(
    client: JobClient, bus: Bus, jobs: RunningService
) -> None:
    """Each is noted, in the end, though the service is killed while it notes them."""
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
        assert (ended.state, ended.result.generate.text) == (SUCCEEDED, job.name)


async def test_a_job_that_the_bus_lost_is_published_again(
    client: JobClient, bus: Bus, nats: NatsServer, tmp_path: Path
) -> None:
    """The bus comes back with nothing on its disk; the record brings the job back."""
    job = await client.submit(generation())
    await bus.message_of(job)
    await nats.kill()
    empty = tmp_path / "empty"
    empty.mkdir()
    nats.use_folder(empty)
    await nats.start()
    headers, event = await bus.message_of(job)
    assert event.payload == job.payload
    assert headers["Nats-Msg-Id"] != id_of(job)  # the bus may remember the first one
    await bus.finished(job, result=result())
    assert (await client.ended(job.name)).state == SUCCEEDED


async def test_a_job_that_is_lost_again_and_again_is_given_up(client: JobClient, bus: Bus) -> None:
    """After as many times as the setting says, and the job says why."""
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
    assert (ended.state, ended.error.reason) == (FAILED, "INTERNAL")
    assert "lost it 2 times" in ended.error.message
    assert times == 2


async def test_a_job_that_waits_or_runs_long_is_not_published_again(
    client: JobClient, bus: Bus
) -> None:
    """As long as its message is on the bus it is not lost, however old it is."""
    waiting = await client.submit(generation())
    running = await client.submit(generation())
    await bus.message_of(running)
    await bus.started(running, 1)
    await asyncio.sleep(2.5)  # several looks, each after more than the time to be taken for lost
    assert await messages(bus) == {id_of(waiting): 1, id_of(running): 1}
    assert (await client.get(running.name)).state == RUNNING


async def test_a_job_whose_outcome_waits_is_not_lost(
    client: JobClient, bus: Bus, jobs: RunningService
) -> None:
    """Its message has gone, and what came of it is on its way: it does not run again."""
    accepted = [await client.submit(generation()) for _ in range(30)]
    await bus.message_of(accepted[-1])
    await jobs.kill()
    for job in accepted:
        await bus.finished(job, result=result())
    await bus.js.purge_stream("HEADRACE_JOBS")
    await asyncio.sleep(1.2)  # older than what is taken for lost
    await jobs.start()
    for job in accepted:
        assert (await client.ended(job.name)).state == SUCCEEDED
    await asyncio.sleep(0.5)
    assert await messages(bus) == {}


async def test_a_watcher_is_told_of_a_restart_and_watches_on(
    client: JobClient, bus: Bus, jobs: RunningService
) -> None:
    """SIGTERM ends the stream with UNAVAILABLE, not with a good end; then it goes on."""
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
    """On one database; a watcher at one sees what the other was told."""
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
