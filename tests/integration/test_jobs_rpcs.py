"""The jobs service as its callers see it: a process, a real bus, a real database."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from headrace.jobs.v1 import jobs_pb2

from libs.errors import AlreadyExists, InvalidArgument, NotFound, ResourceExhausted, Unauthenticated
from libs.rpc.identity import Identity
from libs.rpc.status import headrace_errors
from tests.support.jobs import (
    FAILED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    Bus,
    JobClient,
    embedding,
    generation,
    id_of,
    job_bus,
    result,
)
from tests.support.nats import running_nats
from tests.support.service import running_service
from tests.support.usage import EVE

# One process for all of them, and nobody that takes the jobs.
pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

MAX_RESULT_BYTES = 1000


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def nats_url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    async with running_nats(tmp_path_factory.mktemp("nats")) as server:
        yield server.url


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def bus(nats_url: str) -> AsyncIterator[Bus]:
    async with job_bus(nats_url) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(
    nats_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[JobClient]:
    home = tmp_path_factory.mktemp("jobs")
    async with (
        running_service(
            "jobs",
            home,
            HEADRACE_NATS_URL=nats_url,
            HEADRACE_MAX_RESULT_BYTES=str(MAX_RESULT_BYTES),
        ) as service,
        service.channel() as channel,
    ):
        yield JobClient(channel)


async def test_an_accepted_job_waits_for_a_worker(client: JobClient, bus: Bus) -> None:
    """It has a record, and a message that says who asked for what under which id."""
    job = await client.submit(generation("hi", max_tokens=5))
    assert job.state == QUEUED
    assert uuid.UUID(id_of(job)).version == 7
    assert job.payload == generation("hi", max_tokens=5, request_id=id_of(job))
    assert await client.get(job.name) == job
    headers, event = await bus.message_of(job)
    assert headers["Nats-Msg-Id"] == id_of(job)
    assert (event.identity.tenant, event.identity.user) == ("acme", "ann")
    assert event.payload == job.payload


async def test_the_same_submission_is_the_same_job(client: JobClient, bus: Bus) -> None:
    """Also many at the same time; and there is one message."""
    job_id = str(uuid.uuid4())
    jobs = await asyncio.gather(
        *(client.submit(embedding("a", "b"), job_id=job_id) for _ in range(20))
    )
    assert all(job == jobs[0] for job in jobs)
    # Published later: all before it are there.
    await bus.message_of(await client.submit(embedding("last")))
    assert [event.job_id for _, event in await bus.submitted()].count(job_id) == 1


async def test_another_payload_under_the_same_id_is_refused(client: JobClient) -> None:
    """And so is somebody else's id, whatever its payload."""
    job = await client.submit(generation("one"))
    with pytest.raises(AlreadyExists) as caught, headrace_errors():
        await client.submit(generation("two"), job_id=id_of(job))
    assert (caught.value.reason, caught.value.metadata) == (
        "RESOURCE_EXISTS",
        {"resource": job.name},
    )
    with pytest.raises(AlreadyExists), headrace_errors():
        await client.submit(generation("one"), job_id=id_of(job), who=EVE)


async def test_wrong_submissions_are_refused(client: JobClient) -> None:
    """By field; nothing is kept of them."""
    job_id = str(uuid.uuid4())
    with pytest.raises(InvalidArgument) as caught, headrace_errors():
        await client.submit(generation(messages=[], top_p=7), job_id=job_id)
    assert [field for field, _ in caught.value.field_violations] == [
        "payload.generate.messages",
        "payload.generate.top_p",
    ]
    with pytest.raises(NotFound), headrace_errors():
        await client.get(f"jobs/{job_id}")
    with pytest.raises(InvalidArgument) as caught, headrace_errors():
        await client.submit(generation(), job_id="7")
    assert [field for field, _ in caught.value.field_violations] == ["job_id"]


async def test_tenants_see_their_own_jobs(client: JobClient) -> None:
    """Another tenant's job does not exist; users of one tenant share theirs."""
    job = await client.submit(generation())
    with pytest.raises(NotFound) as caught, headrace_errors():
        await client.get(job.name, who=EVE)
    assert caught.value.metadata == {"resource": job.name}
    with pytest.raises(NotFound), headrace_errors():
        await anext(client.watch(job.name, who=EVE))
    assert await client.get(job.name, who=Identity("acme", "ben")) == job


@pytest.mark.parametrize("name", ["", "jobs/", "jobs/7", "models/smollm2"])
async def test_names_that_are_none_are_refused(client: JobClient, name: str) -> None:
    """By every RPC that takes one."""
    with pytest.raises(InvalidArgument), headrace_errors():
        await client.get(name)
    with pytest.raises(InvalidArgument), headrace_errors():
        await anext(client.watch(name))


async def test_callers_without_identity_are_refused(client: JobClient) -> None:
    """The edge always names one."""
    with pytest.raises(Unauthenticated), headrace_errors():
        await client.stub.SubmitJob(jobs_pb2.SubmitJobRequest(payload=generation()))


async def test_a_watcher_sees_each_state_and_the_end(client: JobClient, bus: Bus) -> None:
    """The stream ends when the job has ended; one that comes later gets the end at once."""
    job = await client.submit(generation())
    watch = client.watch(job.name)
    seen = [await anext(watch)]
    await bus.started(job, 1)
    await bus.started(job, 2)
    await bus.finished(job, 2, result=result("done"))
    seen += [change async for change in watch]
    assert [(change.state, change.attempt_count) for change in seen] == [
        (QUEUED, 0),
        (RUNNING, 1),
        (RUNNING, 2),
        (SUCCEEDED, 2),
    ]
    assert seen[-1].result == result("done")
    assert seen[-1] == await client.get(job.name)
    assert [change async for change in client.watch(job.name)] == [seen[-1]]


async def test_the_first_end_counts_whatever_comes_later(client: JobClient, bus: Bus) -> None:
    """Twice, late, of another attempt, with another outcome: nothing changes."""
    job = await client.submit(generation())
    error = jobs_pb2.JobError(code="NOT_FOUND", reason="MODEL_NOT_FOUND", message="no such model")
    await bus.finished(job, 2, error=error)
    ended = await client.ended(job.name)
    assert (ended.state, ended.error, ended.attempt_count) == (FAILED, error, 2)
    for _ in range(2):
        await bus.started(job, 3)
        await bus.finished(job, 3, result=result())
    other = await client.submit(generation())
    await bus.finished(other, result=result())
    await client.ended(other.name)  # told after, so those before it were heard
    assert await client.get(job.name) == ended


async def test_outcomes_of_unknown_jobs_hold_up_nothing(client: JobClient, bus: Bus) -> None:
    """They change no record, and the next one is taken."""
    stranger = jobs_pb2.Job(name=f"jobs/{uuid.uuid4()}")
    await bus.finished(stranger, result=result())
    await bus.finished(jobs_pb2.Job(), result=result())
    job = await client.submit(generation())
    await bus.finished(job, result=result())
    assert (await client.ended(job.name)).state == SUCCEEDED


async def test_a_result_over_the_limit_fails_the_job(client: JobClient, bus: Bus) -> None:
    """What may be kept is bounded; the job says so."""
    job = await client.submit(generation())
    await bus.finished(job, result=result("x" * MAX_RESULT_BYTES))
    ended = await client.ended(job.name)
    assert (ended.state, ended.error.code, ended.error.reason) == (
        FAILED,
        "RESOURCE_EXHAUSTED",
        "MESSAGE_TOO_LARGE",
    )


async def test_a_worker_that_tells_nothing_fails_the_job(client: JobClient, bus: Bus) -> None:
    """Neither result nor error is an error."""
    job = await client.submit(generation())
    await bus.finished(job)
    ended = await client.ended(job.name)
    assert (ended.state, ended.error.reason) == (FAILED, "INTERNAL")


async def test_a_client_that_goes_away_stops_watching(client: JobClient) -> None:
    """Its place is free again."""
    job = await client.submit(generation())
    calls = []
    for _ in range(5):
        call = client.stub.WatchJob(
            jobs_pb2.WatchJobRequest(name=job.name), metadata=Identity("acme", "ann").metadata()
        )
        await anext(aiter(call))
        calls.append(call)
    for call in calls:
        call.cancel()
    for call in calls:
        assert await call.code() is grpc.StatusCode.CANCELLED


async def test_more_jobs_than_may_wait_are_refused_until_one_is_taken(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """With the limit and when to try again; what was accepted is still answered."""
    async with (
        running_nats(tmp_path_factory.mktemp("nats")) as nats,
        running_service(
            "jobs",
            tmp_path_factory.mktemp("full"),
            HEADRACE_NATS_URL=nats.url,
            HEADRACE_MAX_WAITING_JOBS="2",
        ) as service,
        service.channel() as channel,
        job_bus(nats.url) as bus,
    ):
        client = JobClient(channel)
        first = await client.submit(generation())
        second = await client.submit(generation())
        with pytest.raises(ResourceExhausted) as caught, headrace_errors():
            await client.submit(generation())
        assert caught.value.reason == "QUEUE_FULL"
        assert caught.value.metadata == {"queue": "jobs", "limit": "2"}
        assert caught.value.retry_after_seconds == 5.0
        assert await client.submit(generation(), job_id=id_of(second)) == second
        watch = client.watch(first.name)
        await anext(watch)
        await bus.started(first, 1)
        assert (await anext(watch)).state == RUNNING
        await client.submit(generation())
