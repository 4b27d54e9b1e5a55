"""Deleted and expired jobs are in no response and in no file of the service and of the bus."""

from __future__ import annotations

import asyncio
import sqlite3
import uuid
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from libs.errors import DeadlineExceeded, NotFound
from libs.rpc.status import headrace_errors
from tests.support.files import files_with
from tests.support.job_mesh import JobMesh, job_mesh
from tests.support.jobs import (
    CANCELLED,
    EVE,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    answer_of,
    generation,
    id_of,
    result,
)

pytestmark = pytest.mark.integration

PROMPT = "canary-of-the-prompt"
ANSWER = "canary-of-the-answer"
WORDS = (PROMPT.encode(), ANSWER.encode())
ERASED_SECONDS = 10.0


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
async def mesh(home: Path) -> AsyncIterator[JobMesh]:
    async with job_mesh(home) as made:
        made.models.text = (ANSWER, " and ", "more")
        yield made


def checkpoint(home: Path) -> None:
    """Moves what the database's log has to the database, as happens from time to time."""
    (database,) = (home / "jobs").rglob("jobs.db")
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


async def until_erased(home: Path, *, seconds: float = ERASED_SECONDS) -> None:
    """Waits until no file has a canary: a worker erases after it has reported."""
    try:
        async with asyncio.timeout(seconds):
            while await asyncio.to_thread(files_with, home, *WORDS):  # noqa: ASYNC110  # no event
                await asyncio.sleep(0.1)
    except TimeoutError:
        assert files_with(home, *WORDS) == []


async def check_gone(mesh: JobMesh, name: str) -> None:
    """Checks that nobody gets the job."""
    for call in (mesh.client.get, mesh.client.cancel, mesh.client.delete):
        with pytest.raises(NotFound) as caught, headrace_errors():
            await call(name)
        assert caught.value.metadata == {"resource": name}
    assert name not in [job.name for job in (await mesh.client.list()).jobs]


async def test_a_queued_job_is_deleted_before_a_worker_comes(mesh: JobMesh, home: Path) -> None:
    """From the database, its log and the stream, in which other jobs stay."""
    before = await mesh.client.submit(generation("before"))
    job = await mesh.client.submit(generation(f"{PROMPT} " * 50_000))
    after = await mesh.client.submit(generation("after"))
    await mesh.bus.message_of(after)
    checkpoint(home)
    assert {path.split("/")[0] for path in files_with(home, *WORDS)} == {"jobs", "nats"}
    watch = mesh.client.watch(job.name)
    assert (await anext(watch)).state == QUEUED
    await mesh.client.delete(job.name)
    assert files_with(home, *WORDS) == []
    assert [change.state async for change in watch] == [CANCELLED]
    await check_gone(mesh, job.name)
    await mesh.worker()
    for other in (before, after):
        assert (await mesh.client.ended(other.name)).state == SUCCEEDED
    assert len(mesh.models.requests) == 2


async def test_an_ended_job_is_deleted_with_its_result(mesh: JobMesh, home: Path) -> None:
    """Also where the stream has other messages that wait."""
    await mesh.worker(HEADRACE_WORKER_CONCURRENCY="1")
    job = await mesh.client.submit(generation(PROMPT))
    ended = await mesh.client.ended(job.name)
    checkpoint(home)
    assert ANSWER in answer_of(ended)
    mesh.models.text = ("other",)
    mesh.models.open.clear()
    others = [await mesh.client.submit(generation("other")) for _ in range(2)]
    await mesh.models.wait(lambda: mesh.models.running == 1)
    await mesh.client.delete(job.name)
    await until_erased(home)
    await check_gone(mesh, job.name)
    mesh.models.open.set()
    for other in others:
        assert (await mesh.client.ended(other.name)).state == SUCCEEDED


async def test_done_messages_are_overwritten(mesh: JobMesh, home: Path) -> None:
    """The stream has neither the payload nor the result of a job that has ended."""
    mesh.models.open.clear()
    await mesh.worker(HEADRACE_WORKER_CONCURRENCY="1")
    job = await mesh.client.submit(generation(PROMPT))
    await mesh.models.wait(lambda: mesh.models.running == 1)
    # Waits in the same file of the stream, which would be removed if it had no message.
    mesh.models.errors = [DeadlineExceeded("late", reason="DEADLINE_EXCEEDED")] * 8
    waiting = await mesh.client.submit(generation("waits"))
    await mesh.bus.message_of(waiting)
    assert files_with(home / "nats", *WORDS) != []
    mesh.models.open.set()
    assert (await mesh.client.ended(job.name)).state == SUCCEEDED
    await until_erased(home / "nats", seconds=4)
    assert [event.job_id for _, event in await mesh.bus.submitted()] == [id_of(waiting)]
    assert files_with(home / "jobs", *WORDS) != []


async def test_a_running_job_is_stopped_and_deleted(mesh: JobMesh, home: Path) -> None:
    """Its watchers see that it was cancelled; what it answers later is not stored."""
    mesh.models.open.clear()
    await mesh.worker()
    job = await mesh.client.submit(generation(PROMPT))
    await mesh.models.wait(lambda: mesh.models.running == 1)
    watch = mesh.client.watch(job.name)
    states = [(await anext(watch)).state]
    await mesh.client.delete(job.name)
    await mesh.models.wait(lambda: mesh.models.cancelled == 1)
    states += [change.state async for change in watch]
    assert states[-2:] == [RUNNING, CANCELLED]
    await until_erased(home)
    await check_gone(mesh, job.name)


async def test_a_job_whose_worker_died_is_deleted(mesh: JobMesh, home: Path) -> None:
    """No other worker runs it."""
    mesh.models.open.clear()
    worker = await mesh.worker()
    job = await mesh.client.submit(generation(PROMPT))
    await mesh.models.wait(lambda: mesh.models.running == 1)
    await worker.kill()
    await mesh.client.delete(job.name)
    await until_erased(home)
    mesh.models.open.set()
    await mesh.worker()
    other = await mesh.client.submit(generation("other"))
    assert (await mesh.client.ended(other.name)).state == SUCCEEDED
    assert len(mesh.models.requests) == 2
    await check_gone(mesh, job.name)


async def test_an_id_can_be_used_again_at_once(mesh: JobMesh) -> None:
    """The bus takes the new message, and late outcomes of the first job change nothing."""
    job_id = str(uuid.uuid4())
    first = await mesh.client.submit(generation("first"), job_id=job_id)
    await mesh.bus.message_of(first)
    await mesh.client.delete(first.name)
    second = await mesh.client.submit(generation("second"), job_id=job_id)
    _, event = await mesh.bus.message_of(second)
    assert event.payload == second.payload
    await mesh.bus.finished(first, result=result("of the first"))
    await mesh.bus.started(second, 1)
    async for change in mesh.client.watch(second.name):
        if change.state != QUEUED:
            break
    assert change.state == RUNNING
    await mesh.bus.finished(second, result=result("of the second"))
    assert answer_of(await mesh.client.ended(second.name)) == "of the second"


async def test_without_the_bus_a_message_is_erased_when_a_worker_takes_it(
    mesh: JobMesh, home: Path
) -> None:
    """The record is gone at once."""
    job = await mesh.client.submit(generation(PROMPT))
    await mesh.bus.message_of(job)
    await mesh.nats.kill()
    await mesh.client.delete(job.name)
    await check_gone(mesh, job.name)
    assert files_with(home / "jobs", *WORDS) == []
    await mesh.nats.start()
    await mesh.worker()
    await until_erased(home)
    assert mesh.models.requests == []


async def test_only_its_tenant_deletes_a_job(mesh: JobMesh) -> None:
    """For others it is like one that does not exist."""
    job = await mesh.client.submit(generation())
    errors = []
    for name in (job.name, f"jobs/{uuid.uuid4()}"):
        with pytest.raises(NotFound) as caught, headrace_errors():
            await mesh.client.delete(name, who=EVE)
        errors.append((str(caught.value).replace(name, ""), caught.value.reason))
    assert errors[0] == errors[1]
    assert (await mesh.client.get(job.name)).state == QUEUED


async def test_an_expired_job_leaves_nothing(home: Path) -> None:
    """After the time of the setting."""
    settings = {"HEADRACE_JOB_RETENTION_SECONDS": "1", "HEADRACE_JOB_EXPIRY_SECONDS": "0.2"}
    async with job_mesh(home, **settings) as mesh:
        mesh.models.text = (ANSWER,)
        cancelled = await mesh.client.submit(generation(PROMPT))
        await mesh.bus.message_of(cancelled)
        await mesh.client.cancel(cancelled.name)
        await until_erased(home)  # no worker has taken its message
        await mesh.worker()
        job = await mesh.client.submit(generation(PROMPT))
        assert (await mesh.client.ended(job.name)).state == SUCCEEDED
        await until_erased(home)
