"""How a connection ends: the client closes it, it is idle, the server stops."""

from __future__ import annotations

import asyncio
import gc
import socket
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from libs.errors import ResourceExhausted
from libs.http1 import server
from libs.rpc.http_call import HttpCall
from libs.rpc.served_call import MAX_REQUEST_BYTES
from tests.support.http_bytes import (  # noqa: F401  # fixtures
    POST,
    TEXT,
    HttpService,
    answer,
    as_services_run,
    one_caller,
    one_service,
    post,
    rest,
    serving_one_path,
)

pytestmark = [
    pytest.mark.integration,
    # pytest-asyncio's other way is a hook for all tests.
    pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture"),
]

_PATIENCE_SECONDS = 10.0
_BRIEF_SECONDS = 1.5  # for what comes at once, or, where a test fails, never
_POLL_SECONDS = 0.01
_LARGE = bytes(32 << 20)  # more than the kernel's buffers take


async def _until(holds: Callable[[], bool], timeout_seconds: float = _PATIENCE_SECONDS) -> None:
    async with asyncio.timeout(timeout_seconds):
        while True:
            if holds():
                return
            await asyncio.sleep(_POLL_SECONDS)


async def test_closing_the_connection_cancels_a_handler_that_waits_for_the_reader(service):
    """Although the buffers are full."""
    paused, ended = asyncio.Event(), asyncio.Event()

    async def handle(call: HttpCall) -> None:
        try:
            asyncio.get_running_loop().call_soon(paused.set)
            await call.send_chunk(_LARGE, content_type=TEXT)
            pytest.fail("all of it has left")
        finally:
            ended.set()

    service.handle = handle
    async with asyncio.timeout(_PATIENCE_SECONDS):
        async with service.caller() as caller:
            caller.writer.write(post())
            await paused.wait()
        await ended.wait()


async def test_an_error_after_the_client_disconnected_is_not_reported(service, caller):
    """Neither the client nor the log needs it."""
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))

    async def handle(call: HttpCall) -> None:
        call.abort()  # or the client disconnects in the same turn of the loop
        raise ResourceExhausted("full", reason="QUEUE_FULL")

    service.handle = handle
    caller.writer.write(post())
    assert await rest(caller) == b""
    await _until(lambda: not service.connections)
    gc.collect()
    assert failures == []


async def test_an_idle_connection_is_closed(service, monkeypatch):
    """Also with half a request, but not while a response takes long."""
    may_end = asyncio.Event()

    async def handle(call: HttpCall) -> None:
        await may_end.wait()
        call.respond(b"late", content_type=TEXT)

    service.handle = handle
    async with (
        asyncio.timeout(_PATIENCE_SECONDS),
        service.caller() as idle,
        service.caller() as half,
        service.caller() as busy,
    ):
        half.writer.write(post()[:-1])
        busy.writer.write(post())
        await _until(lambda: any(one.task for one in service.connections))
        monkeypatch.setattr(server, "IDLE_SECONDS", _POLL_SECONDS)
        service.server._sweep.cancel()
        service.server._close_idle()
        assert [await rest(one) for one in (idle, half)] == [b"", b""]
        may_end.set()
        assert await answer(busy) == (200, b"late")


async def test_a_connection_with_a_request_under_way_is_not_idle(service, caller):
    """Even if it was idle for long before."""
    await _until(lambda: bool(service.connections))
    (connection,) = service.connections
    connection.active_seconds -= 2 * server.IDLE_SECONDS
    caller.writer.write(POST + b"expect: 100-continue\r\ncontent-length: 3\r\n\r\n")
    assert await caller.head() == (100, {})
    service.server._sweep.cancel()
    service.server._close_idle()
    caller.writer.write(b"abc")
    assert await answer(caller) == (200, b"abc")


async def test_a_client_that_never_reads_is_disconnected(service, caller, monkeypatch):
    """The response is dropped with it."""

    async def handle(call: HttpCall) -> None:
        call.respond(_LARGE, content_type=TEXT)

    service.handle = handle
    caller.writer.write(post())
    await caller.head()
    caller.writer.transport.pause_reading()
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.05)
    service.server._sweep.cancel()
    service.server._close_idle()
    await _until(lambda: not service.connections, _BRIEF_SECONDS)


async def test_a_connection_without_a_request_holds_no_body(service, caller):
    """The edge keeps thousands."""
    large = post(bytes(MAX_REQUEST_BYTES))

    async def handle(call: HttpCall) -> None:
        call.respond(b"", content_type=TEXT)

    service.handle = handle
    caller.writer.write(post())
    await answer(caller)
    tracemalloc.start()
    try:
        caller.writer.write(large)
        await answer(caller)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < MAX_REQUEST_BYTES // 2
    finally:
        tracemalloc.stop()


async def test_a_closed_connection_needs_no_garbage_collection(service):
    """Its memory is freed at once."""
    async with service.caller() as caller:
        caller.writer.write(post())
        await answer(caller)
        (connection,) = map(weakref.ref, service.connections)
        gc.collect()
        gc.disable()
    try:
        await _until(lambda: not service.connections)
        await asyncio.sleep(_POLL_SECONDS)
        assert connection() is None
    finally:
        gc.enable()


async def test_stopping_closes_idle_connections_and_announces_it_on_others(service, caller):
    """Clients send no further requests on those."""
    started, may_end = asyncio.Event(), asyncio.Event()

    async def handle(call: HttpCall) -> None:
        started.set()
        await may_end.wait()
        await call.send_chunk(b"done", content_type=TEXT)

    service.handle = handle
    async with service.caller() as idle:
        caller.writer.write(post() + post())
        await started.wait()
        stopping = asyncio.create_task(service.server.stop())
        assert await rest(idle) == b""
        may_end.set()
        assert (await caller.head())[1]["connection"] == "close"
        assert await rest(caller) == b"4\r\ndone\r\n0\r\n\r\n"
        await stopping


async def test_stopping_does_not_wait_for_a_stuck_handler(service, caller, monkeypatch):
    """Not even for one that ignores its cancellation."""
    monkeypatch.setattr(server, "_CANCELLED_SECONDS", 0.1)
    service.server._drain_seconds = 0
    started, may_end = asyncio.Event(), asyncio.Event()

    async def handle(_call: HttpCall) -> None:
        started.set()
        while not may_end.is_set():
            try:
                await may_end.wait()
            except asyncio.CancelledError:
                continue

    service.handle = handle
    caller.writer.write(post())
    await started.wait()
    await service.server.stop()
    assert await rest(caller) == b""
    may_end.set()


async def test_a_response_cancelled_by_stopping_does_not_look_complete(service, caller):
    """The client must see that it broke off."""
    service.server._drain_seconds = 0

    async def handle(call: HttpCall) -> None:
        await call.send_chunk(b"half", content_type=TEXT)
        await asyncio.Event().wait()

    service.handle = handle
    caller.writer.write(post())
    await caller.head()
    assert await caller.chunk() == b"half"
    await service.server.stop()
    assert not (await rest(caller)).endswith(b"0\r\n\r\n")


async def test_stopping_waits_until_responses_are_sent(service, caller):
    """For as long as the drain lasts."""

    async def handle(call: HttpCall) -> None:
        call.respond(_LARGE, content_type=TEXT)

    service.handle = handle
    caller.writer.write(post())
    _, headers = await caller.head()
    stopping = asyncio.create_task(service.server.stop())
    assert len(await rest(caller)) == int(headers["content-length"])
    await stopping


async def test_a_connection_that_opens_during_stopping_does_no_harm(service):
    """The others are still drained."""
    with socket.socket() as newcomer:
        newcomer.setblocking(False)
        newcomer.connect_ex(service.host_and_port)
        # It is accepted before this runs, and made after it.
        await asyncio.create_task(service.server.stop())


async def test_a_request_under_way_when_stopping_starts_is_answered(service, caller):
    """The edge may have sent it before its health check failed; then the connection is closed."""
    caller.writer.write(post(b"before"))
    assert await answer(caller) == (200, b"before")
    stopping = asyncio.create_task(service.server.stop())
    await asyncio.sleep(0)  # now it has started
    caller.writer.write(post(b"after"))
    status, headers = await caller.head()
    assert (status, headers["connection"]) == (200, "close")
    assert await rest(caller) == b"after"
    await stopping
