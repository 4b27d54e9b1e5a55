"""Bytes that are not the request's protobuf message, or are too many, over every kind of call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from headrace.cost.v1 import cost_pb2, cost_pb2_grpc

from libs.clock import SystemClock
from libs.grpc_stream.call import MAX_MESSAGES_AT_ONCE, ServerStreamCall, ServerStreamError
from libs.rpc.channel import open_channel
from libs.rpc.framing import framed
from libs.rpc.interceptors import MAX_OPEN_REQUESTS
from libs.rpc.served_call import MAX_OPEN_REQUEST_BYTES
from libs.rpc.server import MAX_RECEIVED_BYTES, RpcServer
from tests.support.http2_frames import (
    END_HEADERS,
    END_STREAM,
    PREFACE,
    FrameType,
    frame,
    literal,
    settings,
)
from tests.support.rpc import Calls, handled_by, reason_of, value
from tests.support.scripted import scripted_mesh
from tests.support.service import running_service

pytestmark = pytest.mark.integration

GOOD = value("a").SerializeToString()
# Unknown wire type, half a field, a text that is not UTF-8 or has half of a surrogate pair, groups
# that are nested too deeply.
MALFORMED = [b"\xff", GOOD[:-1], b"\x0a\x01\xff", b"\x0a\x03\xed\xa0\x80", b"\x0b" * 1000]
HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection.{}.ServerReflection/ServerReflectionInfo"


async def unary(request: StringValue, _context: Any) -> StringValue:
    return request


async def echo(requests: AsyncIterator[StringValue], context: Any) -> None:
    async for request in requests:
        await context.write(request)


async def join(requests: AsyncIterator[StringValue], _context: Any) -> StringValue:
    return value("".join([request.value async for request in requests]))


async def repeat(request: StringValue, context: Any) -> None:
    await context.write(request)


def raw(calls: Calls, kind: str, request: Any) -> Any:
    """Calls with bytes."""
    method = getattr(calls._channel, kind)(f"/headrace.test.v1.TestService/{kind}")
    return method(request)


async def end(call: Any) -> None:
    if not hasattr(call, "read"):
        await call
        return
    while await call.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]  # not in the stubs
        pass


async def outcome(call: Any) -> tuple[grpc.StatusCode, str]:
    """Returns the status and the reason of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await end(call)
    return raised.value.code(), reason_of(raised.value)


@pytest.mark.parametrize("message", MALFORMED, ids=["type", "half", "utf-8", "surrogate", "deep"])
async def test_a_message_that_cannot_be_parsed_is_an_invalid_argument(message):
    """With `ErrorInfo`; gRPC's own deserialisers would end the call with `UNKNOWN`."""
    async with handled_by(
        unary_unary=unary, unary_stream=repeat, stream_unary=join, stream_stream=echo
    ) as calls:
        expected = (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
        for kind in ("unary_unary", "unary_stream"):
            assert await outcome(raw(calls, kind, message)) == expected
        for kind in ("stream_unary", "stream_stream"):
            assert await outcome(raw(calls, kind, iter([GOOD, message, GOOD]))) == expected
        assert (await calls.unary_unary(value("a"))).value == "a"


async def test_the_messages_before_a_malformed_one_are_answered():
    """A stream fails where the fault is."""
    async with handled_by(stream_stream=echo) as calls:
        call = raw(calls, "stream_stream", iter([GOOD, b"\xff"]))
        assert StringValue.FromString(await call.read()).value == "a"
        assert await outcome(call) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    server = RpcServer("127.0.0.1:0", clock=SystemClock())
    await server.start()
    async with open_channel(server.address, traced=False, retries=False) as opened:
        yield opened
    await server.stop(drain_seconds=0)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"\xff", "INVALID_FIELD"),
        (bytes(MAX_OPEN_REQUEST_BYTES + 1), "MESSAGE_TOO_LARGE"),
    ],
    ids=["malformed", "large"],
)
async def test_methods_that_need_no_token_accept_small_messages_only(channel, message, reason):
    """They carry a name; a message is not parsed before its size is checked."""
    expected = (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert await outcome(channel.unary_unary(f"{HEALTH}Check")(message)) == expected
    assert await outcome(channel.unary_stream(f"{HEALTH}Watch")(message)) == expected
    for version in ("v1", "v1alpha"):
        call = channel.stream_stream(REFLECTION.format(version))(iter([message]))
        assert await outcome(call) == expected


async def test_a_name_in_an_open_method_may_be_long(channel):
    """Health of a service by name, and reflection of a symbol."""
    request = health_pb2.HealthCheckRequest(service="x" * (MAX_OPEN_REQUEST_BYTES - 8))
    call = channel.unary_unary(f"{HEALTH}Check")(request.SerializeToString())
    assert await outcome(call) == (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")
    asked = reflection_pb2.ServerReflectionRequest(list_services="*")
    call = channel.stream_stream(REFLECTION.format("v1"))(iter([asked.SerializeToString()]))
    answer = reflection_pb2.ServerReflectionResponse.FromString(await call.read())
    assert answer.list_services_response.service


async def test_grpc_receives_little_more_than_a_request_may_have(channel):
    """It is in memory before the call is looked at; only tensors are larger."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await channel.unary_unary(f"{HEALTH}Check")(bytes(MAX_RECEIVED_BYTES + 1))
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_stream_without_a_token_ends(channel):
    """Nobody can ask one server for ever."""
    asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol="grpc.health.v1.Health")
    requests = iter([asked.SerializeToString()] * (MAX_OPEN_REQUESTS + 1))
    call = channel.stream_stream(REFLECTION.format("v1"))(requests)
    for _ in range(MAX_OPEN_REQUESTS):
        answer = reflection_pb2.ServerReflectionResponse.FromString(await call.read())
        assert answer.file_descriptor_response.file_descriptor_proto
    assert await outcome(call) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")


@pytest.mark.parametrize("method", [f"{HEALTH}Check", "/headrace.jobs.v1.JobService/GetJob"])
async def test_compressed_messages_are_not_decompressed(channel, method):
    """GRPC would do that before a token is checked: 64 KiB become 64 MiB."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await channel.unary_unary(method)(bytes(1024), compression=grpc.Compression.Gzip)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_edge_refuses_compressed_messages_with_a_reason(tmp_path):
    """GRPC's own refusal has none. `Generate` takes them: its server decompresses up to a limit."""
    async with scripted_mesh(tmp_path) as mesh:
        stub = cost_pb2_grpc.CostServiceStub(mesh.channel)
        request = cost_pb2.ListPricesRequest(filter=" " * 1000)
        caller = mesh.edge.metadata()
        await stub.ListPrices(request, metadata=caller)
        for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
            call = stub.ListPrices(request, metadata=caller, compression=compression)
            assert await outcome(call) == (grpc.StatusCode.UNIMPLEMENTED, "INVALID_FIELD")
        channel: Any = mesh.channel
        check = channel.unary_unary(f"{HEALTH}Check")
        await check(b"")
        call = check(bytes(100), compression=grpc.Compression.Gzip)
        assert await outcome(call) == (grpc.StatusCode.UNIMPLEMENTED, "INVALID_FIELD")


async def test_a_backend_that_sends_empty_messages_does_not_hold_up_others():
    """A reader that never waits itself lets others run between a few hundred of them."""
    count = 13_000  # as many as fit into a stream's window
    call = ServerStreamCall()
    call.data_received(framed(b"") * count)
    call.ended(None)
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    others = asyncio.ensure_future(take_turns())
    received = 0
    with suppress(ServerStreamError):  # there are no trailers
        while messages := await call.read():
            assert len(messages) <= MAX_MESSAGES_AT_ONCE
            received += len(messages)
    others.cancel()
    assert received == count
    assert turns >= count // MAX_MESSAGES_AT_ONCE


async def test_a_process_whose_server_grpc_itself_ends_exits(tmp_path):
    """A path that is not UTF-8 ends it; the supervisor starts the process again."""
    async with running_service("registry", tmp_path) as service:
        host, _, port = service.address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": "/\xff",
            ":authority": "a",
            "content-type": "application/grpc",
            "te": "trailers",
        }
        block = b"".join(literal(name, value) for name, value in fields.items())
        block = block.replace("\xff".encode(), b"\xff\xff")
        writer.write(PREFACE + settings({}) + frame(FrameType.HEADERS, END_HEADERS, 1, block))
        await asyncio.wait_for(service.process.wait(), 15)
        writer.transport.abort()


async def test_a_header_that_is_not_utf8_is_not_logged(tmp_path):
    """GRPC itself would log all of it, and it may be a token."""
    async with running_service("registry", tmp_path) as service:
        host, _, port = service.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": f"{HEALTH}Check",
            ":authority": "a",
            "content-type": "application/grpc",
            "te": "trailers",
            "authorization": "Bearer canary-8713\xff",
        }
        block = b"".join(literal(name, value) for name, value in fields.items())
        block = block.replace("\xff".encode(), b"\xff\xff")
        writer.write(PREFACE + settings({}) + frame(FrameType.HEADERS, END_HEADERS, 1, block))
        writer.write(frame(FrameType.DATA, END_STREAM, 1, framed(b"")))
        received = b""
        async with asyncio.timeout(10):
            while b"grpc-status" not in received:
                received += await reader.read(1 << 16)
        writer.transport.abort()
        assert "canary" not in service.log.read_text()


async def test_a_server_that_is_stopped_has_ended_normally():
    """Nobody restarts it."""
    server = RpcServer("127.0.0.1:0", clock=SystemClock())
    await server.start()
    ended = asyncio.ensure_future(server.ended())
    await server.stop(drain_seconds=0)
    await asyncio.wait_for(ended, 10)
