"""Workers run jobs through the services that users call, and report what came of them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from headrace.inference.v1 import inference_pb2

from libs.chat.wire import text_message
from libs.errors import (
    Aborted,
    DeadlineExceeded,
    HeadraceError,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from libs.rpc.status import to_status
from tests.support.job_mesh import JobMesh, job_mesh
from tests.support.jobs import (
    FAILED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    USAGE,
    JobClient,
    Models,
    answer_of,
    embedding,
    generation,
    id_of,
    reason_of,
    user,
)

# One worker for all of them.
pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

MAX_RESULT_BYTES = 100_000


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[JobMesh]:
    async with job_mesh(tmp_path_factory.mktemp("job_mesh")) as made:
        await made.worker(
            HEADRACE_MAX_RESULT_BYTES=str(MAX_RESULT_BYTES), HEADRACE_JOB_TIMEOUT_SECONDS="5"
        )
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def models(mesh: JobMesh) -> AsyncIterator[Models]:
    mesh.models.requests.clear()
    mesh.models.errors.clear()
    mesh.models.open.set()
    mesh.models.text = ("one ", "two ", "three")
    mesh.models.with_final = True
    yield mesh.models
    mesh.models.open.set()


@pytest_asyncio.fixture(loop_scope="module")
async def client(mesh: JobMesh, models: Models) -> JobClient:
    return mesh.client


async def test_a_generation_returns_the_complete_answer(client: JobClient, models: Models) -> None:
    """Text and final message, requested in the submitter's name with the job's id."""
    job = await client.submit(generation("hi", max_tokens=5), who=user("acme", "zoe"))
    seen = [(change.state, change.attempt_count) async for change in client.watch(job.name)]
    assert seen[-2:] == [(RUNNING, 1), (SUCCEEDED, 1)]
    answer = (await client.get(job.name)).result.generate
    assert answer.message == text_message(inference_pb2.ROLE_ASSISTANT, "one two three")
    assert answer.final.finish_reason == inference_pb2.FINISH_REASON_STOP
    assert answer.final.usage == USAGE
    ((request, metadata),) = models.requests
    assert request == generation("hi", max_tokens=5, request_id=id_of(job)).generate
    assert metadata["x-headrace-tenant"] == "acme"
    assert metadata["x-headrace-user"] == "zoe"
    assert metadata["x-headrace-scopes"] == "infer"


async def test_an_embedding_returns_vectors(client: JobClient, models: Models) -> None:
    """Through the embedding cache, likewise."""
    job = await client.submit(embedding("a", "b", "c"))
    ended = await client.ended(job.name)
    assert ended.state == SUCCEEDED
    assert len(ended.result.embed.embeddings) == 3
    ((request, metadata),) = models.requests
    assert (request.request_id, list(request.texts)) == (id_of(job), ["a", "b", "c"])
    assert (metadata["x-headrace-tenant"], metadata["x-headrace-scopes"]) == ("acme", "infer")


async def test_the_request_id_of_the_client_is_used(client: JobClient, models: Models) -> None:
    """The cost of the job is found under it."""
    own = str(uuid.uuid4())
    job = await client.submit(generation(request_id=own))
    assert (await client.ended(job.name)).result.generate.final.request_id == own


@pytest.mark.parametrize(
    "error",
    [
        NotFound("no such model", reason="MODEL_NOT_FOUND", metadata={"models": "smollm2"}),
        InvalidArgument.of_field("messages", "too long"),
        Aborted("slow down", reason="ETAG_MISMATCH", retry_after_seconds=2.5),
        Internal("broken", reason="INTERNAL"),
    ],
    ids=lambda error: error.code,
)
async def test_an_error_that_would_come_again_ends_the_job_at_once(
    client: JobClient, models: Models, error: HeadraceError
) -> None:
    """With all details that the service gave; it is not tried again."""
    models.errors.append(error)
    ended = await client.ended((await client.submit(generation())).name)
    assert (ended.state, ended.attempt_count) == (FAILED, 1)
    assert ended.error == to_status(error)
    assert len(models.requests) == 1


async def test_errors_that_may_pass_are_tried_again(client: JobClient, models: Models) -> None:
    """With pauses, in new attempts, until it works."""
    models.errors += [
        ResourceExhausted("full", reason="QUEUE_FULL"),
        DeadlineExceeded("too slow", reason="DEADLINE_EXCEEDED"),
    ]
    job = await client.submit(generation())
    seen = [(change.state, change.attempt_count) async for change in client.watch(job.name)]
    assert seen[-4:] == [(RUNNING, 1), (RUNNING, 2), (RUNNING, 3), (SUCCEEDED, 3)]


async def test_the_error_says_how_long_to_wait(client: JobClient, models: Models) -> None:
    """If that is longer than the pause between attempts, it is used."""
    loading = Unavailable("loading", reason="MODEL_NOT_READY", retry_after_seconds=1.5)
    models.errors += [loading] * 3  # as often as the channel itself tries
    loop = asyncio.get_running_loop()
    start = loop.time()
    assert (await client.ended((await client.submit(embedding("a"))).name)).attempt_count == 2
    assert loop.time() - start >= 1.5


async def test_an_answer_that_ends_early_is_tried_again(client: JobClient, models: Models) -> None:
    """A stream that ends with OK but without its final message is not complete."""
    models.with_final = False
    job = await client.submit(generation())
    async for change in client.watch(job.name):
        if change.attempt_count == 2:
            models.with_final = True
    assert answer_of(await client.get(job.name)) == "one two three"


async def test_a_result_over_the_limit_ends_the_job_and_the_generation(
    client: JobClient, models: Models
) -> None:
    """The engine is stopped as soon as there is too much."""
    models.open.clear()
    models.text = ("x" * (MAX_RESULT_BYTES + 1), "never", "seen")
    cancelled = models.cancelled
    ended = await client.ended((await client.submit(generation())).name)
    assert (ended.state, reason_of(ended), ended.attempt_count) == (
        FAILED,
        "MESSAGE_TOO_LARGE",
        1,
    )
    await models.wait(lambda: models.running == 0)
    assert models.cancelled == cancelled + 1


async def test_vectors_may_be_too_large_as_well(client: JobClient, models: Models) -> None:
    """They are counted before anything is published."""
    ended = await client.ended((await client.submit(embedding(*["a"] * 2048))).name)
    assert ended.state == SUCCEEDED
    models.vector_length = MAX_RESULT_BYTES // 4
    ended = await client.ended((await client.submit(embedding("a"))).name)
    models.vector_length = 2
    assert (ended.state, reason_of(ended)) == (FAILED, "MESSAGE_TOO_LARGE")


async def test_a_worker_runs_as_many_jobs_as_it_may(client: JobClient, models: Models) -> None:
    """Four; the others wait, or another worker takes them."""
    models.open.clear()
    accepted = [await client.submit(generation(str(number))) for number in range(7)]
    await models.wait(lambda: models.running == 4)
    await asyncio.sleep(0.3)
    assert models.running == 4
    states = [(await client.get(job.name)).state for job in accepted]
    assert sorted(states) == [QUEUED] * 3 + [RUNNING] * 4
    models.open.set()
    for job in accepted:
        assert (await client.ended(job.name)).state == SUCCEEDED
    assert len(models.requests) == 7
