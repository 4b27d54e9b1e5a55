"""What belongs to another tenant is, in every answer, like what does not exist."""

from __future__ import annotations

import statistics
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from headrace.cost.v1 import cost_pb2, cost_pb2_grpc
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from headrace.jobs.v1 import jobs_pb2, jobs_pb2_grpc

from libs.chat.wire import text_message
from libs.errors import HeadraceError
from libs.rpc.status import from_rpc_error
from tests.support.mesh import RunningMesh

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

ROUNDS = 15
# Answers about both kinds of names take about equally long: medians of `ROUNDS` calls, in turns.
MAX_TIME_RATIO = 2.0
MAX_TIME_DIFFERENCE_SECONDS = 0.004


@dataclass(frozen=True)
class World:
    """Two tenants; the first one has a job that ended, one that waits or runs, and a request."""

    mesh: RunningMesh
    channel: grpc.aio.Channel
    job: str
    request_id: str
    owner: tuple[tuple[str, str], ...]
    stranger: tuple[tuple[str, str], ...]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(mesh: RunningMesh) -> AsyncIterator[World]:
    owner = mesh.metadata(tenant="owner", user="olga")
    stranger = mesh.metadata(tenant="stranger", user="sam")
    async with mesh.channel() as channel:
        request_id = str(uuid.uuid4())
        message = text_message(inference_pb2.ROLE_USER, "hello")
        request = inference_pb2.GenerateRequest(
            model="smollm2", max_tokens=4, messages=[message], request_id=request_id
        )
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        assert [each async for each in stub.Generate(request, metadata=owner)]
        jobs = jobs_pb2_grpc.JobServiceStub(channel)
        request.request_id = ""
        answer = await jobs.SubmitJob(
            jobs_pb2.SubmitJobRequest(payload=jobs_pb2.JobPayload(generate=request)),
            metadata=owner,
        )
        watch = jobs_pb2.WatchJobRequest(name=answer.job.name)
        changes = [change async for change in jobs.WatchJob(watch, metadata=owner)]
        assert changes[-1].job.state == jobs_pb2.JOB_STATE_SUCCEEDED
        yield World(mesh, channel, answer.job.name, request_id, owner, stranger)


# How to ask about something, and the name of something that the owner has.
Question = tuple[str, Callable[[World, str], Message], Callable[[World], str]]
QUESTIONS: list[Question] = [
    ("GetJob", lambda _w, name: jobs_pb2.GetJobRequest(name=name), lambda w: w.job),
    ("CancelJob", lambda _w, name: jobs_pb2.CancelJobRequest(name=name), lambda w: w.job),
    ("DeleteJob", lambda _w, name: jobs_pb2.DeleteJobRequest(name=name), lambda w: w.job),
    ("WatchJob", lambda _w, name: jobs_pb2.WatchJobRequest(name=name), lambda w: w.job),
    (
        "GetRequestCost",
        lambda _w, name: cost_pb2.GetRequestCostRequest(request_id=name),
        lambda w: w.request_id,
    ),
]


def unknown_like(name: str) -> str:
    """Returns a name of the same form that nothing has."""
    collection, slash, _ = name.rpartition("/")
    return f"{collection}{slash}{uuid.uuid4()}"


async def refusal(world: World, method: str, request: Message) -> HeadraceError:
    """Asks as the stranger, and returns the error."""
    stub: Any = (
        cost_pb2_grpc.CostServiceStub(world.channel)
        if method == "GetRequestCost"
        else jobs_pb2_grpc.JobServiceStub(world.channel)
    )
    call = getattr(stub, method)(request, metadata=world.stranger)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if method == "WatchJob" else call)
    return from_rpc_error(caught.value)


@pytest.mark.parametrize(
    ("method", "ask", "owned"), QUESTIONS, ids=[question[0] for question in QUESTIONS]
)
async def test_answers_do_not_tell_what_exists_elsewhere(
    world: World,
    method: str,
    ask: Callable[[World, str], Message],
    owned: Callable[[World], str],
) -> None:
    """Code, reason, message and all details are the same but for the name that was asked for."""
    name = owned(world)
    other = unknown_like(name)
    taken = await refusal(world, method, ask(world, name))
    unknown = await refusal(world, method, ask(world, other))

    def said(error: HeadraceError, asked: str) -> list[str]:
        parts = [
            error.code,
            error.reason,
            error.message,
            str(error.metadata),
            error.resource,
            str(error.field_violations),
            str(error.retry_after_seconds),
        ]
        return [part.replace(asked, "NAME") for part in parts]

    assert taken.code == "NOT_FOUND"
    assert said(taken, name) == said(unknown, other)


async def test_the_time_of_an_answer_does_not_tell_it_either(world: World) -> None:
    """Medians of calls that ask about both kinds of names in turns."""
    for method, ask, owned in QUESTIONS:
        name = owned(world)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(ROUNDS):
            for exists, asked in ((True, name), (False, unknown_like(name))):
                began = time.perf_counter()
                await refusal(world, method, ask(world, asked))
                seconds[exists].append(time.perf_counter() - began)
        slow, fast = sorted(map(statistics.median, seconds.values()), reverse=True)
        assert slow < MAX_TIME_RATIO * fast or slow - fast < MAX_TIME_DIFFERENCE_SECONDS, method


async def test_lists_and_sums_have_only_the_callers_own(world: World) -> None:
    """Also with another tenant's page token or filter."""
    jobs = jobs_pb2_grpc.JobServiceStub(world.channel)
    cost = cost_pb2_grpc.CostServiceStub(world.channel)
    first = await jobs.ListJobs(jobs_pb2.ListJobsRequest(page_size=1), metadata=world.owner)
    assert [job.name for job in first.jobs] == [world.job]
    for token in ("", first.next_page_token):
        listed = await jobs.ListJobs(
            jobs_pb2.ListJobsRequest(page_token=token), metadata=world.stranger
        )
        assert list(listed.jobs) == []
    usage = await cost.QueryUsage(cost_pb2.QueryUsageRequest(), metadata=world.stranger)
    assert {row.tenant for row in usage.rows} <= {"tenants/stranger"}
    for tenant in ("tenants/owner", "tenants/nobody", "tenants/-"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cost.QueryUsage(
                cost_pb2.QueryUsageRequest(tenant=tenant), metadata=world.stranger
            )
        assert from_rpc_error(caught.value).reason == "SCOPE_MISSING"


async def test_the_request_id_of_another_tenant_is_free_to_use(world: World) -> None:
    """Each of both sees its own costs."""
    message = text_message(inference_pb2.ROLE_USER, "hello, but longer than the other")
    request = inference_pb2.GenerateRequest(
        model="smollm2", max_tokens=4, messages=[message], request_id=world.request_id
    )
    stub = inference_pb2_grpc.InferenceServiceStub(world.channel)
    answers = [each async for each in stub.Generate(request, metadata=world.stranger)]
    cost = cost_pb2_grpc.CostServiceStub(world.channel)
    wanted = cost_pb2.GetRequestCostRequest(request_id=world.request_id)
    theirs = await cost.GetRequestCost(wanted, metadata=world.stranger)
    ours = await cost.GetRequestCost(wanted, metadata=world.owner)
    assert theirs.cost_nano_usd == answers[-1].final.cost_nano_usd
    assert (theirs.tenant, ours.tenant) == ("tenants/stranger", "tenants/owner")
    assert theirs.cost_nano_usd != ours.cost_nano_usd
