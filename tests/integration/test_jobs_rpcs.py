"""The RPCs of the jobs service, which runs as a process with a real bus and a real database."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import code_pb2
from headrace.events.v1 import events_pb2
from headrace.jobs.v1 import jobs_pb2

from libs.bus.broadcast import listen
from libs.bus.subjects import JOB_CANCELLED
from libs.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
)
from libs.rpc.status import headrace_errors, to_status
from tests.support.jobs import (
    ANN,
    CANCELLED,
    EVE,
    FAILED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    Bus,
    JobClient,
    embedding,
    error_info,
    generation,
    id_of,
    job_bus,
    reason_of,
    result,
    user,
)
from tests.support.nats import running_nats
from tests.support.service import running_service

# One process for all of them, and no worker.
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
    """It has a record, and a message with its id, its payload and who submitted it."""
    job = await client.submit(generation("hi", max_tokens=5))
    assert job.state == QUEUED
    assert uuid.UUID(id_of(job)).version == 7
    assert job.payload == generation("hi", max_tokens=5, request_id=id_of(job))
    assert await client.get(job.name) == job
    headers, event = await bus.message_of(job)
    assert headers["Nats-Msg-Id"] == f"{id_of(job)}@{job.create_time.ToMicroseconds()}"
    assert (event.identity.tenant, event.identity.user) == ("tenants/acme", "ann")
    assert event.create_time == job.create_time
    assert event.payload == job.payload


async def test_the_same_submission_is_the_same_job(client: JobClient, bus: Bus) -> None:
    """Also many at the same time; and there is one message."""
    job_id = str(uuid.uuid4())
    jobs = await asyncio.gather(
        *(client.submit(embedding("a", "b"), job_id=job_id) for _ in range(20))
    )
    assert all(job == jobs[0] for job in jobs)
    # Published last: all before it are on the bus.
    await bus.message_of(await client.submit(embedding("last")))
    assert [event.job_id for _, event in await bus.submitted()].count(job_id) == 1


async def test_another_payload_under_the_same_id_is_refused(client: JobClient) -> None:
    """So is the id of another tenant's job, whatever its payload."""
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
    """By field; nothing of them is stored."""
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


async def test_a_job_has_no_higher_priority_than_its_token_allows(client: JobClient) -> None:
    """It is refused when it is submitted, not when it runs."""
    with pytest.raises(PermissionDenied) as caught, headrace_errors():
        await client.submit(generation(priority=5), who=replace(ANN, max_priority=4))
    assert caught.value.reason == "PRIORITY_NOT_ALLOWED"
    assert caught.value.metadata == {"max_priority": "4"}
    job = await client.submit(generation(priority=5), who=replace(ANN, max_priority=5))
    assert job.payload.generate.priority == 5


async def test_tenants_see_their_own_jobs(client: JobClient) -> None:
    """Another tenant's job does not exist; users of one tenant share theirs."""
    job = await client.submit(generation())
    with pytest.raises(NotFound) as caught, headrace_errors():
        await client.get(job.name, who=EVE)
    assert caught.value.metadata == {"resource": job.name}
    with pytest.raises(NotFound), headrace_errors():
        await anext(client.watch(job.name, who=EVE))
    assert await client.get(job.name, who=user("acme", "ben")) == job


@pytest.mark.parametrize("name", ["", "jobs/", "jobs/7", "models/smollm2"])
async def test_invalid_names_are_refused(client: JobClient, name: str) -> None:
    """By every RPC that takes one."""
    with pytest.raises(InvalidArgument), headrace_errors():
        await client.get(name)
    with pytest.raises(InvalidArgument), headrace_errors():
        await anext(client.watch(name))


async def test_callers_without_identity_are_refused(client: JobClient) -> None:
    """The edge always adds one."""
    with pytest.raises(Unauthenticated), headrace_errors():
        await client.stub.SubmitJob(jobs_pb2.SubmitJobRequest(payload=generation()))


async def test_a_watcher_sees_each_state_and_the_end(client: JobClient, bus: Bus) -> None:
    """The stream ends when the job has ended; a later one gets the last state at once."""
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


async def test_the_first_end_counts_whatever_arrives_later(client: JobClient, bus: Bus) -> None:
    """Twice, late, of another attempt, with another outcome: nothing changes."""
    job = await client.submit(generation())
    error = to_status(
        NotFound("no such model", reason="MODEL_NOT_FOUND", metadata={"models": "smollm2"})
    )
    await bus.finished(job, 2, error=error)
    ended = await client.ended(job.name)
    assert (ended.state, ended.error, ended.attempt_count) == (FAILED, error, 2)
    for _ in range(2):
        await bus.started(job, 3)
        await bus.finished(job, 3, result=result())
    other = await client.submit(generation())
    await bus.finished(other, result=result())
    await client.ended(other.name)  # reported last: all before it are stored
    assert await client.get(job.name) == ended


async def test_outcomes_of_unknown_jobs_delay_nothing(client: JobClient, bus: Bus) -> None:
    """They change no record, and the next outcome is stored."""
    stranger = jobs_pb2.Job(name=f"jobs/{uuid.uuid4()}")
    await bus.finished(stranger, result=result())
    await bus.finished(jobs_pb2.Job(), result=result())
    job = await client.submit(generation())
    await bus.finished(job, result=result())
    assert (await client.ended(job.name)).state == SUCCEEDED


async def test_a_result_over_the_limit_fails_the_job(client: JobClient, bus: Bus) -> None:
    """The job has the error, with the limit."""
    job = await client.submit(generation())
    await bus.finished(job, result=result("x" * MAX_RESULT_BYTES))
    ended = await client.ended(job.name)
    assert (ended.state, ended.error.code) == (FAILED, code_pb2.RESOURCE_EXHAUSTED)
    info = error_info(ended.error)
    assert info.reason == "MESSAGE_TOO_LARGE"
    assert info.metadata == {"limit_bytes": str(MAX_RESULT_BYTES)}


async def test_a_worker_that_reports_nothing_fails_the_job(client: JobClient, bus: Bus) -> None:
    """Neither result nor error is an error."""
    job = await client.submit(generation())
    await bus.finished(job)
    ended = await client.ended(job.name)
    assert (ended.state, reason_of(ended)) == (FAILED, "INTERNAL")


async def test_a_client_that_cancels_stops_watching(client: JobClient) -> None:
    """Another client can watch."""
    job = await client.submit(generation())
    calls = []
    for _ in range(5):
        call = client.stub.WatchJob(
            jobs_pb2.WatchJobRequest(name=job.name), metadata=ANN.metadata()
        )
        await anext(aiter(call))
        calls.append(call)
    for call in calls:
        call.cancel()
    for call in calls:
        assert await call.code() is grpc.StatusCode.CANCELLED


async def test_a_queued_job_is_cancelled_at_once(client: JobClient, bus: Bus) -> None:
    """Also again; its watchers see it, and outcomes that arrive later change nothing."""
    job = await client.submit(generation())
    watch = client.watch(job.name)
    await anext(watch)
    cancelled = await client.cancel(job.name)
    assert cancelled.state == CANCELLED
    assert cancelled.payload == job.payload
    assert cancelled.HasField("expire_time")
    assert [change async for change in watch] == [cancelled]
    assert await client.cancel(job.name) == cancelled
    await bus.started(job, 1)
    await bus.finished(job, result=result())
    other = await client.submit(generation())
    await bus.finished(other, result=result())
    await client.ended(other.name)  # reported last: all before it are stored
    assert await client.get(job.name) == cancelled


async def test_a_running_job_is_cancelled_and_workers_are_informed(
    client: JobClient, bus: Bus
) -> None:
    """They get its id, once."""
    heard: list[events_pb2.JobCancelled] = []
    await listen(bus.client, JOB_CANCELLED, heard.append)
    await bus.client.flush()
    job = await client.submit(generation())
    watch = client.watch(job.name)
    await anext(watch)
    await bus.started(job, 1)
    assert (await anext(watch)).state == RUNNING
    for _ in range(2):
        cancelled = await client.cancel(job.name)
        assert (cancelled.state, cancelled.attempt_count) == (CANCELLED, 1)
    async with asyncio.timeout(10):
        while not heard:  # noqa: ASYNC110  # no event
            await asyncio.sleep(0.01)
    await bus.client.flush()
    assert [event.job_id for event in heard] == [id_of(job)]


async def test_a_job_that_has_ended_cannot_be_cancelled(client: JobClient, bus: Bus) -> None:
    """Nor can a job of another tenant."""
    job = await client.submit(generation())
    await bus.finished(job, result=result())
    ended = await client.ended(job.name)
    with pytest.raises(FailedPrecondition) as caught, headrace_errors():
        await client.cancel(job.name)
    assert caught.value.reason == "JOB_NOT_CANCELLABLE"
    assert caught.value.metadata == {"resource": job.name, "state": "JOB_STATE_SUCCEEDED"}
    assert await client.get(job.name) == ended
    with pytest.raises(NotFound), headrace_errors():
        await client.cancel(job.name, who=EVE)


async def test_views_say_how_much_of_a_job_is_returned(client: JobClient, bus: Bus) -> None:
    """Basic is the default of lists, full that of all others."""
    job = await client.submit(generation())
    assert job.HasField("payload")
    await bus.finished(job, result=result())
    ended = await client.ended(job.name)
    basic = jobs_pb2.Job()
    basic.CopyFrom(ended)
    basic.ClearField("payload")
    basic.ClearField("result")
    assert ended.HasField("payload")
    assert ended.HasField("result")
    assert await client.get(job.name, view=jobs_pb2.JOB_VIEW_BASIC) == basic
    assert await client.get(job.name, view=jobs_pb2.JOB_VIEW_FULL) == ended
    watched = client.watch(job.name, view=jobs_pb2.JOB_VIEW_BASIC)
    assert [change async for change in watched] == [basic]
    assert (await client.list(page_size=1)).jobs[0] == basic
    full = await client.list(page_size=1, view=jobs_pb2.JOB_VIEW_FULL)
    assert full.jobs[0] == ended
    with pytest.raises(InvalidArgument), headrace_errors():
        await client.get(job.name, view=7)


async def test_a_tenant_lists_its_jobs_page_by_page(client: JobClient) -> None:
    """The newest first, each once, also where jobs are submitted meanwhile."""
    zoe = user("zebra", "zoe")
    submitted = [await client.submit(generation(), who=zoe) for _ in range(5)]
    names: list[str] = []
    token = ""
    while not names or token:
        page = await client.list(who=zoe, page_size=2, page_token=token)
        assert len(page.jobs) <= 2
        names += [job.name for job in page.jobs]
        token = page.next_page_token
        await client.submit(generation(), who=zoe)
    assert names == [job.name for job in reversed(submitted)]
    assert list((await client.list(who=user("nobody", "n"))).jobs) == []


async def test_a_list_is_filtered_by_state(client: JobClient) -> None:
    """By the name of the enum's value."""
    who = user("filters", "fay")
    waiting, cancelled = [await client.submit(generation(), who=who) for _ in range(2)]
    await client.cancel(cancelled.name, who=who)
    for state, job in (("QUEUED", waiting), ("CANCELLED", cancelled)):
        page = await client.list(who=who, filter=f'state = "JOB_STATE_{state}"')
        assert [listed.name for listed in page.jobs] == [job.name]


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"filter": 'state = "QUEUED"'}, "filter"),
        ({"filter": 'state = "JOB_STATE_UNSPECIFIED"'}, "filter"),
        ({"filter": 'tenant = "acme"'}, "filter"),
        ({"page_size": -1}, "page_size"),
        ({"page_token": "x"}, "page_token"),
        ({"page_token": "bm90IGEga2V5"}, "page_token"),
        ({"page_token": "MjAyNi0xMS0wMVQwMDowMDowMCBqb2I="}, "page_token"),
        ({"view": 7}, "view"),
        ({"parent": "batches/b"}, "parent"),
    ],
)
async def test_wrong_lists_are_refused(
    client: JobClient, fields: dict[str, Any], wrong: str
) -> None:
    """By field."""
    with pytest.raises(InvalidArgument) as caught, headrace_errors():
        await client.list(**fields)
    assert [field for field, _ in caught.value.field_violations] == [wrong]


async def test_batches_are_refused(client: JobClient) -> None:
    """Until they are supported."""
    request = jobs_pb2.SubmitJobRequest(payload=generation(), parent="batches/b")
    with pytest.raises(InvalidArgument) as caught, headrace_errors():
        await client.stub.SubmitJob(request, metadata=ANN.metadata())
    assert [field for field, _ in caught.value.field_violations] == ["parent"]
