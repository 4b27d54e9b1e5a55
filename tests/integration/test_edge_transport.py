"""How calls are carried: retries, deadlines, cancellation, backpressure, replicas that change."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import struct
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from headrace.cost.v1 import cost_pb2, cost_pb2_grpc
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from headrace.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from headrace.registry.v1 import registry_pb2, registry_pb2_grpc

from tests.support.edge import NOWHERE, running_edge, serving
from tests.support.scripted import ScriptedMesh, scripted_mesh, two_deltas
from tests.support.stalling_service import stalling_service

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
    return running


def _generate(mesh: ScriptedMesh, **options: Any) -> Any:
    stub = inference_pb2_grpc.InferenceServiceStub(mesh.channel)
    request = inference_pb2.GenerateRequest(model="m")
    return stub.Generate(request, metadata=mesh.edge.metadata(), **options)


def _reason(error: grpc.aio.AioRpcError) -> str:
    """Returns the reason in the details, which must have the call's own code and message."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]  # an error is a call
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "headrace"
    return str(info.reason)


async def test_a_cancelled_call_is_cancelled_behind_the_edge(mesh: ScriptedMesh) -> None:
    """The engine stops as soon as the caller goes away."""
    cancelled = asyncio.Event()

    async def generate(_request: Any, _context: Any) -> AsyncIterator[Any]:
        yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text="a"))
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    mesh.inference.generate = generate
    call = _generate(mesh)
    async with asyncio.timeout(_PATIENCE_SECONDS):
        async for message in call:
            assert message.delta.text == "a"
            call.cancel()
            break
        await cancelled.wait()


async def test_messages_arrive_one_by_one(mesh: ScriptedMesh) -> None:
    """Each message leaves the edge before the next one exists."""
    may_go_on = asyncio.Semaphore(0)

    async def generate(_request: Any, _context: Any) -> AsyncIterator[Any]:
        for number in range(5):
            yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text=str(number)))
            await may_go_on.acquire()

    mesh.inference.generate = generate
    async with asyncio.timeout(_PATIENCE_SECONDS):
        number = 0
        async for message in _generate(mesh):
            assert message.delta.text == str(number)
            number += 1
            may_go_on.release()
    assert number == 5


async def test_a_reader_that_stops_reading_stops_the_writer(mesh: ScriptedMesh) -> None:
    """What nobody reads stays where it is made: the edge keeps a few megabytes at most."""
    written = 0
    text = "x" * (64 * 1024)

    async def generate(_request: Any, _context: Any) -> AsyncIterator[Any]:
        nonlocal written
        for _ in range(1024):
            yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text=text))
            written += 1

    mesh.inference.generate = generate
    call = _generate(mesh)
    await call.read()
    before = -1
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while written != before:  # until the writer stands still
            before = written
            await asyncio.sleep(0.5)
    call.cancel()
    assert written * len(text) < 16 * _MIB


async def test_a_93_mb_upload_passes(mesh: ScriptedMesh) -> None:
    """An artifact streams through; nothing on the way wants to hold it whole."""
    chunk, count = bytes(_MIB), 93
    digest = "sha256:" + hashlib.sha256(chunk * count).hexdigest()

    async def parts() -> AsyncIterator[registry_pb2.UploadArtifactRequest]:
        yield registry_pb2.UploadArtifactRequest(
            metadata=registry_pb2.ArtifactMetadata(digest=digest, size_bytes=count * _MIB)
        )
        for _ in range(count):
            yield registry_pb2.UploadArtifactRequest(chunk=chunk)

    stub = registry_pb2_grpc.RegistryServiceStub(mesh.channel)
    answer = await stub.UploadArtifact(parts(), metadata=mesh.edge.metadata())
    assert (answer.digest, answer.size_bytes) == (digest, count * _MIB)


async def test_a_message_that_is_too_long_is_told_so(mesh: ScriptedMesh) -> None:
    """The edge does not gather gRPC bodies; the service itself refuses them, with details."""
    stub = inference_pb2_grpc.InferenceServiceStub(mesh.channel)
    request = inference_pb2.GenerateRequest(model="x" * (5 * _MIB))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [m async for m in stub.Generate(request, metadata=mesh.edge.metadata())]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert _reason(caught.value) == "MESSAGE_TOO_LARGE"


async def test_headers_that_are_too_long_are_refused(mesh: ScriptedMesh) -> None:
    """The edge reads 60 KiB of headers at most."""
    headers = mesh.edge.bearer() | {f"x-{n}": "x" * 7000 for n in range(9)}
    path = "/headrace.inference.v1.InferenceService/Generate"
    async with mesh.http.post(path, json={}, headers=headers) as response:
        assert response.status == 431
    assert mesh.inference.calls == 0


async def test_the_deadline_is_kept_even_where_the_service_is_mute(tmp_path) -> None:
    """A host that takes connections and says nothing does not hold its callers for ever.

    Through gRPC-Web, because gRPC's own clients keep the deadline themselves.
    """

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with (
        server,
        running_edge(tmp_path, {"inference": [f"{host}:{port}"]}) as edge,
        aiohttp.ClientSession(edge.url) as http,
    ):
        headers = {
            **edge.bearer(),
            "content-type": "application/grpc-web+proto",
            "grpc-timeout": "300m",
        }
        path = "/headrace.inference.v1.InferenceService/Generate"
        async with http.post(path, data=struct.pack(">BI", 0, 0), headers=headers) as response:
            assert response.headers["grpc-status"] == "4"
            encoded = response.headers["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(base64.b64decode(encoded))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (status.code, info.reason) == (4, "DEADLINE_EXCEEDED")


async def test_the_deadline_reaches_the_service(mesh: ScriptedMesh) -> None:
    """The service knows how long its caller waits, and is cancelled then."""
    cancelled = asyncio.Event()
    remaining: list[float] = []

    async def generate(_request: Any, context: Any) -> AsyncIterator[Any]:
        remaining.append(context.time_remaining())
        try:
            await asyncio.Event().wait()
            yield inference_pb2.GenerateResponse()
        finally:
            cancelled.set()

    mesh.inference.generate = generate
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _generate(mesh, timeout=0.5).read()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(_PATIENCE_SECONDS):
        await cancelled.wait()
    assert 0 < remaining[0] < 1  # clocks differ by a little


async def test_reads_are_tried_again(mesh: ScriptedMesh) -> None:
    """A read that was refused twice succeeds; nobody sees that the service was not ready yet."""
    mesh.cost.refusals_left = 2
    stub = cost_pb2_grpc.CostServiceStub(mesh.channel)
    await stub.ListPrices(cost_pb2.ListPricesRequest(), metadata=mesh.edge.metadata())
    assert mesh.cost.refusals_left == 0


async def test_writes_and_generations_are_not_tried_again(mesh: ScriptedMesh) -> None:
    """What a service has seen is repeated by its caller or by nobody."""
    mesh.cost.refusals_left = 2
    stub = cost_pb2_grpc.CostServiceStub(mesh.channel)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.CreatePrice(cost_pb2.CreatePriceRequest(), metadata=mesh.edge.metadata())
    assert mesh.cost.refusals_left == 1
    mesh.cost.refusals_left = 0

    async def abort(_request: Any, context: Any) -> AsyncIterator[Any]:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        yield inference_pb2.GenerateResponse()

    mesh.inference.generate = abort
    with pytest.raises(grpc.aio.AioRpcError):
        _ = [message async for message in _generate(mesh)]
    assert mesh.inference.calls == 1


async def test_a_service_that_is_down_is_unavailable_with_a_time_to_retry(
    mesh: ScriptedMesh,
) -> None:
    """The caller learns that trying again may help, and when."""
    stub = jobs_pb2_grpc.JobServiceStub(mesh.channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetJob(jobs_pb2.GetJobRequest(), metadata=mesh.edge.metadata())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert _reason(caught.value) == "EDGE_UNAVAILABLE"
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]  # an error is a call
    assert status is not None
    retry = error_details_pb2.RetryInfo()
    assert status.details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1000
    assert "127.0.0.1" not in (caught.value.details() or "")


async def test_a_service_that_dies_in_mid_stream_never_looks_like_a_good_end(tmp_path) -> None:
    """What was delivered stays delivered; the end is an error, in gRPC and in server-sent events.

    Once a stream has begun, Envoy can only reset it, and gRPC's clients call that INTERNAL.
    """
    mesh = ScriptedMesh()
    async with (
        stalling_service() as (process, address, http_address),
        running_edge(
            tmp_path, {"inference": [address], "inference_http": [http_address]}
        ) as mesh.edge,
        mesh.edge.channel() as mesh.channel,
        aiohttp.ClientSession(mesh.edge.url) as http,
        http.post("/v1/chat/completions", json={}, headers=mesh.edge.bearer()) as events,
    ):
        assert await events.content.readany() == b"data: 1\n\n"
        call = _generate(mesh)
        assert (await call.read()).delta.text == "a"
        process.kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        with pytest.raises(aiohttp.ClientPayloadError):
            await events.content.readany()


async def test_a_service_that_starts_later_is_found(tmp_path) -> None:
    """Services start in any order; after a restart nobody has to touch the edge."""
    mesh = ScriptedMesh()
    async with serving(mesh.add_inference) as address:
        pass  # takes a port and gives it up
    async with (
        running_edge(tmp_path, {"inference": [address]}) as mesh.edge,
        mesh.edge.channel() as mesh.channel,
    ):
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError):
                _ = [message async for message in _generate(mesh)]
            async with serving(mesh.add_inference, address=address):
                await mesh.edge.cluster_is_healthy("inference")
                assert [message async for message in _generate(mesh)]


async def test_health_over_http_follows_inference(tmp_path) -> None:
    """`GET /healthz` says whether tokens can flow, not whether Envoy runs."""
    mesh = ScriptedMesh()
    async with serving(mesh.add_inference) as address:
        pass
    async with scripted_mesh(tmp_path / "up") as up, up.http.get("/healthz") as response:
        assert response.status == 200
    async with (
        running_edge(tmp_path / "down", {"inference": [address]}) as edge,
        aiohttp.ClientSession(edge.url) as http,
        http.get("/healthz") as response,
    ):
        assert response.status == 503


async def test_a_dead_replica_is_passed_over(tmp_path) -> None:
    """With two replicas, one of them dead, every call succeeds."""
    mesh = ScriptedMesh()
    async with (
        serving(mesh.add_inference) as address,
        running_edge(tmp_path, {"inference": [NOWHERE, address]}) as mesh.edge,
        mesh.edge.channel() as mesh.channel,
    ):
        for _ in range(20):
            assert len([message async for message in _generate(mesh)]) == 3


async def test_two_edges_stand_side_by_side(tmp_path) -> None:
    """Each has its own ports and keys: the token of one does not open the other."""
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
