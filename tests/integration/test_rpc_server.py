"""Start and stop of a server, as callers and health checks see them."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from libs.clock import SystemClock
from libs.rpc.access import OPEN
from libs.rpc.channel import open_channel
from libs.rpc.server import RpcServer
from tests.support.rpc import SERVICE, Calls, value

pytestmark = pytest.mark.integration


# What an HTTP/2 server says first.
EMPTY_SETTINGS = b"\0\0\0\4\0\0\0\0\0"


class Held:
    """A handler that waits for the test before it answers."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.go_on = asyncio.Event()

    async def unary_unary(self, request: StringValue, _context: Any) -> StringValue:
        self.started.set()
        await self.go_on.wait()
        return request


@pytest.fixture
def held():
    return Held()


@pytest.fixture
async def server(held):
    running = RpcServer("127.0.0.1:0", clock=SystemClock(), scope_of=lambda _: OPEN)
    handler = grpc.unary_unary_rpc_method_handler(
        held.unary_unary,
        request_deserializer=StringValue.FromString,
        response_serializer=StringValue.SerializeToString,
    )
    generic = grpc.method_handlers_generic_handler(SERVICE, {"unary_unary": handler})
    running.grpc.add_generic_rpc_handlers((generic,))
    await running.start(ready=False)
    yield running
    await running.stop(drain_seconds=0)


@pytest.fixture
async def channel(server):
    async with open_channel(server.address, traced=False, retries=False) as opened:
        yield opened


async def test_health_reports_ready_not_ready_and_draining(server, channel):
    """A load balancer that watches gets these states in order."""
    states = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    status = health_pb2.HealthCheckResponse.ServingStatus
    assert (await states.read()).status == status.NOT_SERVING
    await server.set_ready(True)
    assert (await states.read()).status == status.SERVING
    stopping = asyncio.ensure_future(server.stop(drain_seconds=5))
    assert (await states.read()).status == status.NOT_SERVING
    states.cancel()
    await stopping


async def test_a_call_that_runs_is_answered_while_the_server_drains(server, channel, held):
    """A restart loses no running call."""
    call = Calls(channel).unary_unary(value("a"))
    await held.started.wait()
    stopping = asyncio.ensure_future(server.stop(drain_seconds=10))
    await asyncio.sleep(0.1)
    held.go_on.set()
    assert (await call).value == "a"
    await stopping


async def test_a_call_that_comes_while_the_server_drains_may_be_tried_elsewhere(
    server, channel, held
):
    """`UNAVAILABLE`, the only status that may be retried blindly."""
    running = Calls(channel).unary_unary(value("a"))
    await held.started.wait()
    stopping = asyncio.ensure_future(server.stop(drain_seconds=10))
    await asyncio.sleep(0.1)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await Calls(channel).unary_unary(value("late"), timeout=5)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    held.go_on.set()
    await running
    await stopping


async def test_a_call_that_outlasts_the_drain_may_be_tried_elsewhere(server, channel, held):
    """It is ended with `UNAVAILABLE`, so that its caller may retry."""
    call = Calls(channel).unary_unary(value("a"))
    await held.started.wait()
    await server.stop(drain_seconds=0.1)
    assert await call.code() is grpc.StatusCode.UNAVAILABLE


async def test_an_address_in_use_is_an_error(server):
    """Two processes on one port would each get half of the calls."""
    other = RpcServer(server.address, clock=SystemClock())
    with pytest.raises(RuntimeError):
        await other.start()
    await other.stop(drain_seconds=0)


async def test_a_peer_that_answers_late_is_reached():
    """At the first attempt: another one would add to its load."""
    tries = []

    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tries.append(writer)
        with suppress(ConnectionError):
            await asyncio.sleep(0.5)
            writer.write(EMPTY_SETTINGS)
            await writer.drain()
            await closing.wait()
        writer.close()

    closing = asyncio.Event()
    peer = await asyncio.start_server(greet, "127.0.0.1", 0)
    address = f"127.0.0.1:{peer.sockets[0].getsockname()[1]}"
    async with open_channel(address, traced=False) as channel, asyncio.timeout(5):
        await channel.channel_ready()
    assert len(tries) == 1
    closing.set()
    peer.close()
    await peer.wait_closed()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_every_service_of_the_mesh(channel, version):
    """Any process can answer for all, so that grpcurl needs no protos."""
    asking = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    call = asking(iter([reflection_pb2.ServerReflectionRequest(list_services="*")]))
    answer = await call.read()
    names = {service.name for service in answer.list_services_response.service}
    assert {
        "headrace.registry.v1.RegistryService",
        "headrace.router.v1.RouterService",
        "headrace.inference.v1.InferenceService",
        "grpc.health.v1.Health",
    } <= names
    assert "headrace.inference.v1.InferenceInternalService" not in names
