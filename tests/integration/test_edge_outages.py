"""Services that are down, silent, killed or not started yet, as callers of the edge see them.

Each is tried with `Generate`, forwarded with HTTP/1.1, and with a service that uses gRPC.
"""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from headrace.cost.v1 import cost_pb2, cost_pb2_grpc
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from headrace.jobs.v1 import jobs_pb2, jobs_pb2_grpc

from tests.support.edge import NOWHERE, running_edge
from tests.support.rpc import reason_of
from tests.support.scripted import GENERATE_PATH, ScriptedMesh, scripted_mesh
from tests.support.stalling_service import stalling_service

pytestmark = pytest.mark.integration


async def _generate(mesh: ScriptedMesh) -> None:
    assert [message async for message in _generation(mesh)]


async def _list_prices(mesh: ScriptedMesh) -> None:
    stub = cost_pb2_grpc.CostServiceStub(mesh.channel)
    await stub.ListPrices(cost_pb2.ListPricesRequest(), metadata=mesh.edge.metadata())


def _generation(mesh: ScriptedMesh) -> Any:
    stub = inference_pb2_grpc.InferenceServiceStub(mesh.channel)
    return stub.Generate(inference_pb2.GenerateRequest(), metadata=mesh.edge.metadata())


def _watch_job(mesh: ScriptedMesh) -> Any:
    stub = jobs_pb2_grpc.JobServiceStub(mesh.channel)
    return stub.WatchJob(jobs_pb2.WatchJobRequest(), metadata=mesh.edge.metadata())


@dataclass(frozen=True)
class _Service:
    """A service, one of its calls, and how it is served."""

    cluster: str
    path: str
    call: Callable[[ScriptedMesh], Any]
    serving: Callable[..., AbstractAsyncContextManager[str]]


EACH_SERVICE = pytest.mark.parametrize(
    "service",
    [
        _Service("inference_http", GENERATE_PATH, _generate, ScriptedMesh.serving_inference),
        _Service(
            "cost",
            "/headrace.cost.v1.CostService/ListPrices",
            _list_prices,
            ScriptedMesh.serving_control,
        ),
    ],
    ids=lambda service: service.cluster,
)


async def _free_address(mesh: ScriptedMesh) -> str:
    async with mesh.serving_grpc() as address:
        return address  # takes a port and gives it up


@EACH_SERVICE
async def test_the_deadline_is_kept_even_where_the_service_is_mute(tmp_path, service) -> None:
    """A host that accepts connections and never answers does not block its callers for ever.

    Through gRPC-Web, because gRPC's own clients keep the deadline themselves.
    """

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with (
        server,
        running_edge(tmp_path, {service.cluster: [f"{host}:{port}"]}) as edge,
        aiohttp.ClientSession(edge.url) as http,
    ):
        headers = {
            **edge.bearer(),
            "content-type": "application/grpc-web+proto",
            "grpc-timeout": "300m",
        }
        body = struct.pack(">BI", 0, 0)
        async with http.post(service.path, data=body, headers=headers) as response:
            assert response.headers["grpc-status"] == "4"
            encoded = response.headers["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(base64.b64decode(encoded))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (status.code, info.reason) == (4, "DEADLINE_EXCEEDED")


@EACH_SERVICE
async def test_a_service_that_is_down_is_unavailable_with_a_time_to_retry(
    tmp_path, service
) -> None:
    """The caller gets UNAVAILABLE with the time to retry after."""
    mesh = ScriptedMesh()
    async with running_edge(tmp_path, {}) as mesh.edge, mesh.edge.channel() as mesh.channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.call(mesh)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert reason_of(caught.value) == "EDGE_UNAVAILABLE"
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]  # an error is a call
    assert status is not None
    retry = error_details_pb2.RetryInfo()
    assert status.details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1000
    assert "127.0.0.1" not in (caught.value.details() or "")


async def test_a_service_that_is_killed_in_mid_stream_never_looks_complete(tmp_path) -> None:
    """The caller keeps what it has and gets an error, with gRPC and with server-sent events.

    Envoy can only reset a stream that has started, which gRPC clients report as INTERNAL.
    """
    mesh = ScriptedMesh()
    async with (
        stalling_service() as (process, inference, control),
        running_edge(tmp_path, {"inference_http": [inference], "jobs": [control]}) as mesh.edge,
        mesh.edge.channel() as mesh.channel,
        aiohttp.ClientSession(mesh.edge.url) as http,
        http.post("/v1/chat/completions", json={}, headers=mesh.edge.bearer()) as events,
    ):
        assert await events.content.readany() == b"data: 1\n\n"
        generation, watch = _generation(mesh), _watch_job(mesh)
        assert (await generation.read()).delta.text == "a"
        assert (await watch.read()).job.name == "a"
        process.kill()
        for call in (generation, watch):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.INTERNAL
        with pytest.raises(aiohttp.ClientPayloadError):
            await events.content.readany()


@EACH_SERVICE
async def test_a_service_that_starts_later_is_found(tmp_path, service) -> None:
    """Services start in any order; after a restart the edge needs no change."""
    mesh = ScriptedMesh()
    address = await _free_address(mesh)
    async with (
        running_edge(tmp_path, {service.cluster: [address]}) as mesh.edge,
        mesh.edge.channel() as mesh.channel,
    ):
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError):
                await service.call(mesh)
            async with service.serving(mesh, address=address):
                await mesh.edge.cluster_is_healthy(service.cluster)
                await service.call(mesh)


async def test_health_over_http_tells_what_chat_would_find(tmp_path) -> None:
    """`GET /healthz` goes the way of chat completions: 503 where these are not answered."""
    async with scripted_mesh(tmp_path / "up") as mesh, mesh.http.get("/healthz") as response:
        assert response.status == 200
    async with (
        running_edge(tmp_path / "down", {"inference_http": [NOWHERE]}) as edge,
        aiohttp.ClientSession(edge.url) as http,
    ):
        for _ in range(2):  # the second answer is from the cache
            async with http.get("/healthz") as response:
                assert response.status == 503
                body = await response.json()
                assert body["details"][0]["reason"] == "EDGE_UNAVAILABLE"


@EACH_SERVICE
async def test_a_dead_replica_is_passed_over(tmp_path, service) -> None:
    """If one of two replicas is dead, every call succeeds."""
    mesh = ScriptedMesh()
    async with (
        service.serving(mesh) as address,
        running_edge(tmp_path, {service.cluster: [NOWHERE, address]}) as mesh.edge,
        mesh.edge.channel() as mesh.channel,
    ):
        for _ in range(20):
            await service.call(mesh)
