"""Workers in outages: killed, stopped, without services. Each job ends, once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from google.rpc import code_pb2
from headrace.embedding.v1 import embedding_pb2_grpc
from headrace.events.v1 import events_pb2
from headrace.inference.v1 import inference_pb2_grpc
from headrace.jobs.v1 import jobs_pb2_grpc

from libs.bus.subjects import WORKER
from libs.bus.worker import PullWorker
from libs.clock import SystemClock
from libs.errors import ResourceExhausted
from libs.metering.prices import PriceBook
from libs.metering.usage import UsageRecorder
from libs.rpc.channel import open_channel
from services.worker.billing import CancelledUsage
from services.worker.cancellations import Cancellations
from services.worker.execution import Execution
from services.worker.records import JobRecords
from services.worker.runner import JobRunner
from tests.support.edge import serving
from tests.support.job_mesh import JobMesh, job_mesh
from tests.support.jobs import (
    FAILED,
    RUNNING,
    SUCCEEDED,
    answer_of,
    generation,
    reason_of,
    result,
)

pytestmark = pytest.mark.integration


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[JobMesh]:
    async with job_mesh(tmp_path) as made:
        yield made


async def test_a_job_of_a_killed_worker_is_run_by_another(mesh: JobMesh) -> None:
    """Killed -9 in the middle of an answer: the job is delivered again, and ends once."""
    mesh.models.open.clear()
    first = await mesh.worker()
    job = await mesh.client.submit(generation())
    await mesh.models.wait(lambda: mesh.models.running == 1)
    await mesh.worker()
    await first.kill()
    await mesh.models.wait(lambda: mesh.models.running == 0)  # the engine was stopped
    mesh.models.open.set()
    ended = await mesh.client.ended(job.name)
    assert (ended.state, ended.attempt_count) == (SUCCEEDED, 2)
    assert len(mesh.models.requests) == 2


async def test_a_job_whose_end_was_reported_is_not_run_again(mesh: JobMesh) -> None:
    """Killed between the bus's acknowledgement of its outcome and the job's own."""
    mesh.models.open.clear()
    worker = await mesh.worker()
    job = await mesh.client.submit(generation())
    await mesh.models.wait(lambda: mesh.models.running == 1)
    await worker.kill()
    await mesh.bus.finished(job, result=result("the last report"))
    ended = await mesh.client.ended(job.name)
    mesh.models.open.set()
    await worker.start()
    async with asyncio.timeout(30):  # its message is delivered again, and acknowledged
        while await mesh.bus.submitted():  # noqa: ASYNC110  # no event
            await asyncio.sleep(0.1)
    assert len(mesh.models.requests) == 1
    assert await mesh.client.get(job.name) == ended


async def test_a_worker_that_is_stopped_finishes_what_it_can(mesh: JobMesh) -> None:
    """SIGTERM: the job that runs ends, no other starts."""
    mesh.models.open.clear()
    worker = await mesh.worker(HEADRACE_WORKER_CONCURRENCY="1")
    job = await mesh.client.submit(generation())
    later = await mesh.client.submit(generation())
    await mesh.models.wait(lambda: mesh.models.running == 1)
    ending = asyncio.create_task(worker.terminate())
    await asyncio.sleep(0.5)
    mesh.models.open.set()
    assert await ending == 0
    ended = await mesh.client.ended(job.name)
    assert (ended.state, ended.attempt_count) == (SUCCEEDED, 1)
    assert len(mesh.models.requests) == 1
    await mesh.worker()
    assert (await mesh.client.ended(later.name)).state == SUCCEEDED


async def test_a_worker_that_is_stopped_returns_the_rest(mesh: JobMesh) -> None:
    """Another worker gets at once what does not end in time, not after ten seconds of silence."""
    mesh.models.open.clear()
    worker = await mesh.worker(HEADRACE_DRAIN_SECONDS="0.5")
    job = await mesh.client.submit(generation())
    await mesh.models.wait(lambda: mesh.models.running == 1)
    await mesh.worker()
    assert await worker.terminate() == 0
    mesh.models.open.set()
    ended = await mesh.client.ended(job.name, seconds=5)
    assert (ended.state, ended.attempt_count) == (SUCCEEDED, 2)


async def test_a_job_waits_for_a_bus_that_restarts(mesh: JobMesh) -> None:
    """Killed -9 while the job runs; the outcome is published later, and nothing runs twice."""
    mesh.models.open.clear()
    await mesh.worker()
    job = await mesh.client.submit(generation())
    await mesh.models.wait(lambda: mesh.models.running == 1)
    await mesh.nats.kill()
    mesh.models.open.set()
    await mesh.models.wait(lambda: mesh.models.running == 0)
    await asyncio.sleep(1)
    await mesh.nats.start()
    assert (await mesh.client.ended(job.name)).state == SUCCEEDED
    assert len(mesh.models.requests) == 1


async def test_a_job_waits_for_services_that_are_away(mesh: JobMesh) -> None:
    """No models run yet, and the jobs service dies: the job runs when the models do."""
    address = "127.0.0.1:1"  # nothing listens there
    worker = await mesh.worker(
        HEADRACE_INFERENCE_ADDRESS=address, HEADRACE_EMBEDDING_CACHE_ADDRESS=address
    )
    job = await mesh.client.submit(generation())
    async for change in mesh.client.watch(job.name):
        if change.attempt_count == 2:
            break
    await mesh.jobs.kill()
    await worker.kill()
    await mesh.worker()
    async with asyncio.timeout(60):
        await mesh.models.wait(lambda: bool(mesh.models.requests))
    await mesh.jobs.start()
    assert (await mesh.client.ended(job.name)).state == SUCCEEDED


async def test_an_error_that_stays_fails_the_job_in_the_end(mesh: JobMesh) -> None:
    """After as many attempts as the consumer has, with the last error; its message is removed."""
    impatient = replace(WORKER, max_attempts=3, retry_delays_seconds=(0.05,))
    full = ResourceExhausted("full", reason="QUEUE_FULL")
    mesh.models.errors += [full] * 10
    async with (
        open_channel(mesh.models_address) as models,
        open_channel(mesh.jobs.address) as jobs,
    ):
        runner = JobRunner(
            execution=Execution(
                inference=inference_pb2_grpc.InferenceServiceStub(models),
                embedding=embedding_pb2_grpc.EmbeddingServiceStub(models),
                timeout_seconds=5,
                max_result_bytes=1000,
            ),
            records=JobRecords(jobs_pb2_grpc.JobServiceStub(jobs)),
            cancellations=Cancellations(),
            cancelled_usage=CancelledUsage(
                UsageRecorder(mesh.bus.publisher, SystemClock(), prices=PriceBook),
                wait_for_prices=asyncio.Event().wait,
            ),
            publisher=mesh.bus.publisher,
            clock=SystemClock(),
        )
        worker = PullWorker[events_pb2.JobSubmitted](
            mesh.bus.js, impatient, concurrency=1, on_exhausted=runner.give_up
        )
        running = asyncio.create_task(worker.run(runner.handle))
        job = await mesh.client.submit(generation())
        ended = await mesh.client.ended(job.name)
        await worker.drain()
        await running
    assert (ended.state, ended.attempt_count) == (FAILED, 3)
    assert (ended.error.code, reason_of(ended), ended.error.message) == (
        code_pb2.RESOURCE_EXHAUSTED,
        "QUEUE_FULL",
        "full",
    )
    assert len(mesh.models.requests) == 3
    assert await mesh.bus.submitted() == []


async def test_jobs_survive_everything_that_is_killed(mesh: JobMesh) -> None:
    """Jobs, workers and the bus are killed in turn while 40 jobs run: all end with a result."""
    workers = [await mesh.worker(), await mesh.worker()]
    accepted = []
    for number in range(40):
        accepted.append(await mesh.client.submit(generation(str(number))))
        if number == 10:
            await workers[0].kill()
        if number == 20:
            await mesh.nats.kill()
            await workers[1].kill()
            await mesh.nats.start()
        if number == 30:
            await mesh.jobs.kill()
            await mesh.jobs.start()
            await workers[0].start()
            async with mesh.jobs.channel() as channel:  # the client can reach it again, too
                await channel.channel_ready()
            await asyncio.sleep(1)
    for job in accepted:
        ended = await mesh.client.ended(job.name)
        assert (ended.state, answer_of(ended)) == (SUCCEEDED, "one two three")
    assert RUNNING not in {(await mesh.client.get(job.name)).state for job in accepted}


async def test_a_worker_starts_before_anything_else(tmp_path: Path) -> None:
    """In any order: it waits for the bus, and then serves its health."""
    async with job_mesh(tmp_path) as mesh:
        await mesh.nats.kill()
        starting = asyncio.create_task(mesh.worker())
        await asyncio.sleep(1.5)
        assert not starting.done()
        await mesh.nats.start()
        worker = await starting
        await worker.healthy()
        job = await mesh.client.submit(generation())
        assert (await mesh.client.ended(job.name)).state == SUCCEEDED


async def test_models_that_start_later_are_found(mesh: JobMesh) -> None:
    """The worker's channel connects when they listen, without a restart of the worker."""
    async with serving(mesh.models.register) as taken:
        address = taken
    await mesh.worker(HEADRACE_INFERENCE_ADDRESS=address)
    job = await mesh.client.submit(generation())
    async for change in mesh.client.watch(job.name):
        if change.attempt_count == 2:
            break
    async with serving(mesh.models.register, address=address):
        assert (await mesh.client.ended(job.name)).state == SUCCEEDED
