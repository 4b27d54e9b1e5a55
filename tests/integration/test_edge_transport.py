"""Retries, deadlines, cancellation, backpressure and limits of the edge."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
import pytest_asyncio
from headrace.cost.v1 import cost_pb2, cost_pb2_grpc
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from headrace.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from headrace.registry.v1 import registry_pb2, registry_pb2_grpc

from libs.errors import Unavailable
from tests.support.rpc import reason_of
from tests.support.scripted import (
    GENERATE_PATH,
    ScriptedMesh,
    no_work,
    refusing,
    scripted_mesh,
    two_deltas,
)

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

_MIB = 1024 * 1024
_PATIENCE_SECONDS = 15.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory) -> AsyncIterator[ScriptedMesh]:
    async with scripted_mesh(tmp_path_factory.mktemp("edge")) as mesh:
        yield mesh


@pytest.fixture
def mesh(running: ScriptedMesh) -> ScriptedMesh:
    running.inference.generate = two_deltas
    running.inference.calls = 0
    running.cost.work = no_work
    return running


def _generate(mesh: ScriptedMesh, **options: Any) -> Any:
    stub = inference_pb2_grpc.InferenceServiceStub(mesh.channel)
    request = inference_pb2.GenerateRequest(model="m")
    return stub.Generate(request, metadata=mesh.edge.metadata(), **options)


def _list_prices(mesh: ScriptedMesh, **options: Any) -> Any:
    stub = cost_pb2_grpc.CostServiceStub(mesh.channel)
    request = cost_pb2.ListPricesRequest()
    return stub.ListPrices(request, metadata=mesh.edge.metadata(), **options)


Texts = Callable[[], AsyncIterator[str]]


def _generated(mesh: ScriptedMesh, texts: Texts) -> Any:
    """Calls for texts from a server of HTTP/1.1."""

    async def generate(_request: Any, _context: Any) -> AsyncIterator[Any]:
        async for text in texts():
            yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text=text))

    mesh.inference.generate = generate
    return _generate(mesh)


def _watched(mesh: ScriptedMesh, texts: Texts) -> Any:
    """Calls for texts from a server of gRPC."""
    mesh.jobs.watch = texts
    stub = jobs_pb2_grpc.JobServiceStub(mesh.channel)
    return stub.WatchJob(jobs_pb2.WatchJobRequest(), metadata=mesh.edge.metadata())


def _text(message: Any) -> str:
    if isinstance(message, inference_pb2.GenerateResponse):
        return message.delta.text
    return str(message.job.name)


EACH_STREAM = pytest.mark.parametrize("stream", [_generated, _watched])


@EACH_STREAM
async def test_a_cancelled_call_is_cancelled_behind_the_edge(mesh: ScriptedMesh, stream) -> None:
    """The engine stops as soon as the caller disconnects."""
    cancelled = asyncio.Event()

    async def texts() -> AsyncIterator[str]:
        yield "a"
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    call = stream(mesh, texts)
    async with asyncio.timeout(_PATIENCE_SECONDS):
        assert _text(await call.read()) == "a"
        call.cancel()
        await cancelled.wait()


@EACH_STREAM
async def test_messages_arrive_one_by_one(mesh: ScriptedMesh, stream) -> None:
    """Each message leaves the edge before the next one exists."""
    may_go_on = asyncio.Semaphore(0)

    async def texts() -> AsyncIterator[str]:
        for number in range(5):
            yield str(number)
            await may_go_on.acquire()

    async with asyncio.timeout(_PATIENCE_SECONDS):
        number = 0
        async for message in stream(mesh, texts):
            assert _text(message) == str(number)
            number += 1
            may_go_on.release()
    assert number == 5


@EACH_STREAM
async def test_a_reader_that_stops_reading_stops_the_writer(mesh: ScriptedMesh, stream) -> None:
    """A slow reader stops the writer: edge, client and kernels buffer a few megabytes only."""
    written = 0
    text = "x" * (64 * 1024)

    async def texts() -> AsyncIterator[str]:
        nonlocal written
        for _ in range(2048):
            yield text
            written += 1

    call = stream(mesh, texts)
    await call.read()
    before = -1
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while written != before:  # until the writer stops
            before = written
            await asyncio.sleep(0.5)
    call.cancel()
    assert written * len(text) < 48 * _MIB


async def test_a_93_mb_upload_passes(mesh: ScriptedMesh) -> None:
    """An artifact is streamed; nothing buffers all of it."""
    chunk, count = bytes(_MIB), 93
    digest = "sha256:" + hashlib.sha256(chunk * count).hexdigest()

    async def parts() -> AsyncIterator[registry_pb2.UploadArtifactRequest]:
        yield registry_pb2.UploadArtifactRequest(
            metadata=registry_pb2.ArtifactMetadata(digest=digest, size_bytes=count * _MIB)
        )
        for _ in range(count):
            yield registry_pb2.UploadArtifactRequest(chunk=chunk)

    stub = registry_pb2_grpc.RegistryServiceStub(mesh.channel)
    answer = await stub.UploadArtifact(
        parts(), metadata=mesh.edge.metadata(scopes="registry billing")
    )
    assert (answer.digest, answer.size_bytes) == (digest, count * _MIB)


async def test_a_message_that_is_too_long_gets_a_clear_error(mesh: ScriptedMesh) -> None:
    """The edge does not buffer gRPC bodies; the service refuses them, with details."""
    text = "x" * (5 * _MIB)
    generate = inference_pb2_grpc.InferenceServiceStub(mesh.channel).Generate
    create_price = cost_pb2_grpc.CostServiceStub(mesh.channel).CreatePrice
    for call in (
        generate(inference_pb2.GenerateRequest(model=text), metadata=mesh.edge.metadata()).read(),
        create_price(
            cost_pb2.CreatePriceRequest(price=cost_pb2.Price(model=text)),
            metadata=mesh.edge.metadata(scopes="registry billing"),
        ),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert reason_of(caught.value) == "MESSAGE_TOO_LARGE"
    assert mesh.inference.calls == 0


async def test_headers_that_are_too_long_are_refused(mesh: ScriptedMesh) -> None:
    """The edge reads 60 KiB of headers at most."""
    headers = mesh.edge.bearer() | {f"x-{n}": "x" * 7000 for n in range(9)}
    async with mesh.http.post(GENERATE_PATH, json={}, headers=headers) as response:
        assert response.status == 431
    assert mesh.inference.calls == 0


async def test_the_deadline_reaches_the_service(mesh: ScriptedMesh) -> None:
    """The service gets the caller's deadline and is cancelled when it passes."""
    remaining: list[float] = []
    cancelled = asyncio.Semaphore(0)

    async def work(context: Any) -> None:
        remaining.append(context.time_remaining())
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.release()

    async def generate(_request: Any, context: Any) -> AsyncIterator[Any]:
        await work(context)
        yield inference_pb2.GenerateResponse()

    mesh.inference.generate = generate
    mesh.cost.work = work
    for call in (_generate(mesh, timeout=0.5).read(), _list_prices(mesh, timeout=0.5)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(_PATIENCE_SECONDS):
            await cancelled.acquire()
        assert 0 < remaining.pop() < 1  # clocks differ by a little


async def test_reads_are_tried_again(mesh: ScriptedMesh) -> None:
    """A read that was refused twice succeeds; the caller does not notice."""
    mesh.cost.refusals_left = 2
    await _list_prices(mesh)
    assert mesh.cost.refusals_left == 0


async def test_writes_and_generations_are_not_tried_again(mesh: ScriptedMesh) -> None:
    """Only the caller may repeat a call that has reached a service."""
    mesh.cost.refusals_left = 2
    stub = cost_pb2_grpc.CostServiceStub(mesh.channel)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.CreatePrice(
            cost_pb2.CreatePriceRequest(), metadata=mesh.edge.metadata(scopes="registry billing")
        )
    assert mesh.cost.refusals_left == 1
    mesh.cost.refusals_left = 0
    mesh.inference.generate = refusing(Unavailable("gone", reason="BACKEND_FAILED"))
    with pytest.raises(grpc.aio.AioRpcError):
        _ = [message async for message in _generate(mesh)]
    assert mesh.inference.calls == 1


async def test_two_edges_stand_side_by_side(tmp_path) -> None:
    """Each has its own ports and keys: a token of one is invalid at the other."""
    async with (
        scripted_mesh(tmp_path / "one") as one,
        scripted_mesh(tmp_path / "two") as two,
    ):
        assert [message async for message in _generate(one)]
        assert [message async for message in _generate(two)]
        stub = inference_pb2_grpc.InferenceServiceStub(two.channel)
        request = inference_pb2.GenerateRequest()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [m async for m in stub.Generate(request, metadata=one.edge.metadata())]
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
