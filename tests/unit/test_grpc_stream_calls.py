"""Token streams from gRPC's own server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from libs.grpc_stream import ServerStreamClient, ServerStreamError
from libs.grpc_stream.connection import Connection
from libs.rpc.channel import MAX_MESSAGE_BYTES
from tests.support.grpc_stream import METHOD, all_of, client_of, error_of, make_silent

WINDOW = 65_535
MIB = 1024 * 1024

Handler = Callable[[bytes, Any], Any]  # a coroutine that writes, or a generator


@asynccontextmanager
async def serving(handler: Handler, port: int = 0) -> AsyncIterator[tuple[grpc.aio.Server, str]]:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)])
    methods = {"Stream": grpc.unary_stream_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Raw", methods),))
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def calling(handler: Handler) -> AsyncIterator[ServerStreamClient]:
    async with serving(handler) as (_, address), client_of(address) as client:
        yield client


async def answer(client: ServerStreamClient, request: bytes = b"") -> list[bytes]:
    return await all_of(await client.call(METHOD, request))


def ask_again(client: ServerStreamClient) -> bool:
    """Ends the wait for a pong; returns whether a PING was sent."""
    (connection,) = client._connections
    timer, connection._pong = connection._pong, None
    if timer is not None:
        timer.cancel()
    return timer is not None


async def echo(request: bytes, _context: Any) -> AsyncIterator[bytes]:
    yield request


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param([b"%d " % index * (index % 40) for index in range(5000)], id="many"),
        pytest.param([b"", b"a", b"", b""], id="empty"),
        pytest.param([], id="none"),
        pytest.param([bytes(5 * MIB), b"after", b"x" * (3 * MIB)], id="larger than the window"),
        pytest.param([b"x" * (WINDOW - 5), b"y" * (WINDOW - 4)], id="as large as the window"),
    ],
)
async def test_all_messages_arrive_complete_and_in_order(messages):
    """Whatever their sizes; every `read` after them returns nothing."""

    async def stream(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        for message in messages:
            yield message

    async with calling(stream) as client:
        call = await client.call(METHOD, b"")
        assert await all_of(call) == messages
        assert await call.read() == []


@pytest.mark.parametrize("size", [0, 1, WINDOW - 5, WINDOW - 4, 8 * MIB])
async def test_a_request_arrives_complete(size):
    """Also where the client must wait until the server opens its window."""
    request = (b"0123456789abcde" * (size // 15 + 1))[:size]
    async with calling(echo) as client:
        assert await answer(client, request) == [request]


async def test_metadata_arrives():
    """Only with the call that it belongs to."""

    async def echo_metadata(_request: bytes, context: Any) -> AsyncIterator[bytes]:
        for name, value in context.invocation_metadata():
            yield f"{name}={value}".encode()

    async with calling(echo_metadata) as client:
        metadata = (("traceparent", "00-ab-cd-01"), ("long", "x" * 5000))
        got = await all_of(await client.call(METHOD, b"", metadata))
        assert {b"traceparent=00-ab-cd-01", b"long=" + b"x" * 5000} <= set(got)
        assert not [one for one in await answer(client) if one.startswith((b"trace", b"long"))]


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.value[0]])
async def test_an_error_comes_after_the_messages_before_it(code, before):
    """With its details, in any language."""

    async def fail(_request: bytes, context: Any) -> AsyncIterator[bytes]:
        for _ in range(before):
            yield b"piece"
        await context.abort(code, "100 % größer\n→ zu groß")

    async with calling(fail) as client:
        call, got = await client.call(METHOD, b""), list[bytes]()
        with pytest.raises(
            ServerStreamError, match=f"{code.name}: 100 % größer\n→ zu groß"
        ) as caught:
            await all_of(call, got)
        assert (caught.value.code, got) == (code, [b"piece"] * before)
        assert (await error_of(call)).code == code


async def test_an_unknown_method_is_unimplemented():
    """The response arrives before all of the request was sent; the connection stays usable."""
    async with calling(echo) as client:
        call = await client.call("/test.Raw/Other", bytes(4 * MIB))
        assert (await error_of(call)).code is grpc.StatusCode.UNIMPLEMENTED
        assert await answer(client, b"next") == [b"next"]


async def test_a_server_that_stops_ends_its_streams_and_is_found_again():
    """UNAVAILABLE while nothing listens; later the next call connects."""
    stopping = asyncio.Event()

    async def stream_until(request: bytes, _context: Any) -> AsyncIterator[bytes]:
        yield request
        await stopping.wait()

    async with serving(stream_until) as (server, address), client_of(address) as client:
        call = await client.call(METHOD, b"first")
        assert await call.read() == [b"first"]
        await server.stop(0)
        assert (await error_of(call)).code is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(ServerStreamError, match="cannot connect") as caught:
            await client.call(METHOD, b"")
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        stopping.set()
        async with serving(stream_until, port=int(address.rpartition(":")[2])):
            assert await answer(client, b"again") == [b"again"]


async def test_a_server_that_drains_finishes_its_streams(monkeypatch):
    """It refuses new streams, which the client knows before the next call."""
    retired, draining, retire = asyncio.Event(), asyncio.Event(), Connection._retire

    def retire_and_set(connection: Connection, why: str) -> None:
        retire(connection, why)
        retired.set()

    monkeypatch.setattr(Connection, "_retire", retire_and_set)

    async def stream_until(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        yield b"before"
        await draining.wait()
        yield b"after"

    async with serving(stream_until) as (server, address), client_of(address) as client:
        call = await client.call(METHOD, b"")
        assert await call.read() == [b"before"]
        stopped = asyncio.create_task(server.stop(10))
        await retired.wait()
        assert not client._connections[0].usable
        draining.set()
        assert await all_of(call) == [b"after"]
        await stopped


async def test_calls_fail_where_nothing_listens():
    """All calls that wait for the connection fail."""
    with socket.socket() as unbound:
        unbound.bind(("127.0.0.1", 0))
        async with client_of(f"127.0.0.1:{unbound.getsockname()[1]}") as client:
            tries = [client.call(METHOD, b"") for _ in range(3)]
            errors = await asyncio.gather(*tries, return_exceptions=True)
    assert [type(error) for error in errors] == [ServerStreamError] * 3
    assert {getattr(error, "code", None) for error in errors} == {grpc.StatusCode.UNAVAILABLE}


async def test_a_call_that_is_closed_is_cancelled_at_the_server():
    """The server stops its work; other calls on the connection continue."""
    cancelled = asyncio.Event()

    async def endless(request: bytes, context: Any) -> None:
        try:
            await context.write(request)
            if request == b"endless":
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with calling(endless) as client:
        call = await client.call(METHOD, b"endless")
        assert await call.read() == [b"endless"]
        call.close()
        await asyncio.wait_for(cancelled.wait(), 5)
        call.close()
        assert await answer(client, b"other") == [b"other"]


async def test_a_reader_that_pauses_holds_the_server_back():
    """Only for its call, by the window of the stream; when it reads, the rest follows."""
    blocked, written = asyncio.Event(), 0

    async def pour(request: bytes, context: Any) -> AsyncIterator[bytes]:
        nonlocal written
        for _ in range(4000 if request == b"pour" else 1):
            writing = asyncio.ensure_future(context.write(bytes(1000)))
            done, _ = await asyncio.wait([writing], timeout=0.5)
            if not done:
                blocked.set()
            await writing
            written += 1000
        yield b"end"

    async with calling(pour) as client:
        call = await client.call(METHOD, b"pour")
        await asyncio.wait_for(blocked.wait(), 20)
        assert written < 4 * WINDOW  # the window, and what gRPC keeps of its own
        assert await answer(client) == [bytes(1000), b"end"]
        assert await all_of(call) == [bytes(1000)] * 4000 + [b"end"]


async def test_two_hundred_calls_at_once_share_one_connection():
    """Each receives its own response."""
    all_here = asyncio.Barrier(200)

    async def repeat(request: bytes, context: Any) -> AsyncIterator[bytes]:
        await all_here.wait()
        for index in range(20):
            yield b"%b %d" % (request, index)
        yield context.peer().encode()

    async with calling(repeat) as client:
        answers = await asyncio.gather(*(answer(client, b"%d" % call) for call in range(200)))
    for call, got in enumerate(answers):
        assert got[:-1] == [b"%d %d" % (call, index) for index in range(20)]
    assert len({got[-1] for got in answers}) == 1


async def test_a_server_accepts_the_pings_of_a_client():
    """A gRPC server closes connections that send too many PINGs while nothing else is sent."""

    async def wait(_request: bytes, context: Any) -> AsyncIterator[bytes]:
        await asked.put(None)
        await go_on.wait()
        yield context.peer().encode()

    asked, go_on = asyncio.Queue[None](), asyncio.Event()
    async with calling(wait) as client:
        calls, questions = [], 0
        for _ in range(6):
            calls.append(await client.call(METHOD, b""))
            await asked.get()
            questions += ask_again(client)
            make_silent(client)
        assert questions == 5
        go_on.set()
        peers = [await all_of(call) for call in calls]
    assert len({peer for (peer,) in peers}) == 1
