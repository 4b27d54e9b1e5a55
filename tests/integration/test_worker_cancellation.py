"""Jobs that are cancelled stop, run no more, and are billed what they used."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from headrace.common.v1 import usage_pb2
from headrace.events.v1 import events_pb2

from libs.metering.prices import rates_of
from libs.metering.usage import cost_of
from tests.support.job_mesh import JobMesh, job_mesh
from tests.support.jobs import (
    CANCELLED,
    MODEL_VERSION,
    SUCCEEDED,
    USAGE,
    embedding,
    generation,
    id_of,
    usage_recorder,
)
from tests.support.usage import PRICE

pytestmark = pytest.mark.integration


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[JobMesh]:
    async with job_mesh(tmp_path) as made:
        yield made


async def usage_records(mesh: JobMesh) -> list[events_pb2.UsageRecorded]:
    """Returns the usage events on the bus."""
    state = (await mesh.bus.js.stream_info("HEADRACE_USAGE")).state
    records: list[events_pb2.UsageRecorded] = []
    for sequence in range(state.first_seq, state.last_seq + 1) if state.messages else ():
        message = await mesh.bus.js.get_msg("HEADRACE_USAGE", sequence)
        if (message.subject or "").endswith("batch_recorded"):
            records += events_pb2.UsageBatchRecorded.FromString(message.data or b"").records
        else:
            records.append(events_pb2.UsageRecorded.FromString(message.data or b""))
    return records


async def first_usage(mesh: JobMesh) -> events_pb2.UsageRecorded:
    """Waits for a usage event; there must be no other."""
    async with asyncio.timeout(30):
        while not (records := await usage_records(mesh)):  # noqa: ASYNC110  # no event
            await asyncio.sleep(0.05)
    (record,) = records
    return record


async def queue_is_empty(mesh: JobMesh) -> None:
    async with asyncio.timeout(30):
        while await mesh.bus.submitted():  # noqa: ASYNC110  # no event
            await asyncio.sleep(0.05)


async def test_a_running_job_stops_and_is_billed_what_it_used(mesh: JobMesh) -> None:
    """The engine is stopped at once; one token of the answer was generated."""
    mesh.models.open.clear()
    await mesh.worker()
    job = await mesh.client.submit(generation())
    await mesh.models.wait(lambda: mesh.models.running == 1)
    await asyncio.sleep(0.3)  # the first token reaches the worker
    assert (await mesh.client.cancel(job.name)).state == CANCELLED
    await mesh.models.wait(lambda: mesh.models.running == 0)
    assert mesh.models.cancelled == 1
    record = await first_usage(mesh)
    usage = usage_pb2.TokenUsage(completion_tokens=1)
    assert record.usage == usage
    assert (record.request_id, record.model_version) == (id_of(job), MODEL_VERSION)
    assert (record.identity.tenant, record.identity.user) == ("tenants/acme", "ann")
    assert (record.model, record.operation) == ("smollm2", usage_pb2.OPERATION_GENERATE)
    assert (record.price, record.cost_nano_usd) == (PRICE.name, cost_of(usage, rates_of(PRICE)))
    await queue_is_empty(mesh)
    mesh.models.open.set()
    assert (await mesh.client.get(job.name)).state == CANCELLED
    assert len(mesh.models.requests) == 1


async def test_a_queued_job_that_is_cancelled_does_not_run(mesh: JobMesh) -> None:
    """The worker reads its record before it runs it; another job is run."""
    job = await mesh.client.submit(generation())
    await mesh.bus.message_of(job)
    await mesh.client.cancel(job.name)
    other = await mesh.client.submit(generation())
    await mesh.worker()
    assert (await mesh.client.ended(other.name)).state == SUCCEEDED
    await queue_is_empty(mesh)
    assert [request.request_id for request, _ in mesh.models.requests] == [id_of(other)]


async def test_an_embedding_that_is_cancelled_stops_and_costs_nothing(mesh: JobMesh) -> None:
    """It is one call without parts; other jobs of the worker go on."""
    mesh.models.open.clear()
    await mesh.worker()
    job = await mesh.client.submit(embedding("a"))
    other = await mesh.client.submit(embedding("b"))
    await mesh.models.wait(lambda: mesh.models.running == 2)
    await mesh.client.cancel(job.name)
    await mesh.models.wait(lambda: mesh.models.running == 1)
    mesh.models.open.set()
    assert (await mesh.client.ended(other.name)).state == SUCCEEDED
    await queue_is_empty(mesh)
    assert await usage_records(mesh) == []


async def test_a_worker_that_missed_the_cancellation_changes_nothing(mesh: JobMesh) -> None:
    """It finishes the job: the result is discarded, and all of its usage is billed, once."""
    mesh.models.recorder = usage_recorder(mesh.bus)
    mesh.models.open.clear()
    await mesh.worker()
    job = await mesh.client.submit(generation())
    await mesh.models.wait(lambda: mesh.models.running == 1)
    await mesh.nats.kill()
    await mesh.client.cancel(job.name)
    await mesh.jobs.kill()  # with the broadcast, which waited for the bus
    await mesh.nats.start()
    await mesh.jobs.start()
    mesh.models.open.set()
    await queue_is_empty(mesh)
    assert (await first_usage(mesh)).usage == USAGE
    other = await mesh.client.submit(generation())
    assert (await mesh.client.ended(other.name)).state == SUCCEEDED  # so the outcome is stored
    ended = await mesh.client.get(job.name)
    assert (ended.state, ended.HasField("result")) == (CANCELLED, False)
