"""Deadlines of HTTP calls: who sets them, and how a client learns that one passed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from libs.clock import SystemClock
from libs.http1 import HttpServer
from libs.openai.errors import OpenAIDialect
from libs.rpc import http_call
from libs.rpc.access import OPEN
from libs.rpc.http_api import HttpApi, HttpRoute
from libs.rpc.http_call import HttpCall

pytestmark = pytest.mark.integration

_CALLER = {"x-headrace-tenant": "acme", "x-headrace-user": "ann"}
_LONGEST_SECONDS = 60.0
_EVENTS = "text/event-stream"


class Service:
    """A server of one path, whose handler the test sets."""

    def __init__(self, longest_seconds: float = _LONGEST_SECONDS) -> None:
        self.handle: Any
        self.http: aiohttp.ClientSession
        clock = SystemClock()
        api = HttpApi(
            routes=[HttpRoute("POST", "/path", self._handle, scope=OPEN)],
            is_ready=lambda: True,
            clock=clock,
            dialect=OpenAIDialect(),
            longest_call_seconds=longest_seconds,
        )
        self.clock = clock
        self.server = HttpServer("127.0.0.1:0", api, drain_seconds=0, clock=clock)

    async def _handle(self, call: HttpCall) -> None:
        await self.handle(call)

    async def post(self, **headers: str) -> tuple[int, bytes]:
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        async with self.http.post("/path", headers=_CALLER | named) as response:
            return response.status, await response.read()

    async def deadlines(self, **headers: str) -> tuple[float, float]:
        """Returns for how long a call may run, and for how long until its response starts."""
        found = []

        async def handle(call: HttpCall) -> None:
            now = self.clock.monotonic_seconds()
            found.append((call.deadline_seconds - now, call.start_deadline_seconds - now))
            call.respond(b"")

        self.handle = handle
        assert await self.post(**headers) == (200, b"")
        (one,) = found
        return one


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    service = Service()
    await service.server.start()
    async with aiohttp.ClientSession(f"http://{service.server.address}") as service.http:
        yield service
    await service.server.stop()


@pytest.mark.parametrize(
    ("headers", "complete", "start"),
    [
        ({}, 60, 60),
        ({"grpc_timeout": "30S"}, 30, 30),
        ({"grpc_timeout": "2H"}, 60, 60),
        ({"x_stainless_read_timeout": "20.5"}, 60, 20.5),
        ({"x_stainless_timeout": "20"}, 60, 20),
        ({"x_stainless_read_timeout": "600"}, 60, 60),
        ({"x_stainless_read_timeout": "20", "grpc_timeout": "10S"}, 10, 10),
        ({"x_stainless_read_timeout": "inf"}, 60, 60),
        ({"x_stainless_read_timeout": "nan"}, 60, 60),
        ({"x_stainless_read_timeout": "-1"}, 60, 60),
        ({"x_stainless_read_timeout": "None"}, 60, 60),
    ],
)
async def test_the_earliest_deadline_holds(service, headers, complete, start):
    """The caller's, that of its client library, or the longest that is allowed."""
    found = await service.deadlines(**headers)
    assert found == (pytest.approx(complete, abs=5), pytest.approx(start, abs=5))


@pytest.mark.parametrize("timeout", ["x", "", "5", "-1S"])
async def test_a_timeout_that_cannot_be_read_is_refused(service, timeout):
    """It must not mean that there is no deadline."""
    status, body = await service.post(grpc_timeout=timeout)
    error = json.loads(body)["error"]
    assert (status, error["param"], error["code"]) == (400, "grpc-timeout", "invalid_field")
    assert "is not a timeout" in error["message"]


@pytest.mark.parametrize("headers", [{"grpc_timeout": "200m"}, {"x_stainless_read_timeout": "0.2"}])
async def test_a_call_past_its_deadline_gets_an_error_and_its_work_ends(service, headers):
    """With OpenAI's error."""
    cancelled = asyncio.Event()

    async def handle(_call: HttpCall) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    service.handle = handle
    status, body = await service.post(**headers)
    assert status == 504
    assert json.loads(body)["error"]["code"] == "deadline_exceeded"
    assert cancelled.is_set()


async def test_a_stream_past_its_deadline_ends_with_an_error_event(service):
    """So that it does not look complete."""

    async def handle(call: HttpCall) -> None:
        await call.send_chunk(b"data: 1\n\n", content_type=_EVENTS)
        await asyncio.Event().wait()

    service.handle = handle
    status, body = await service.post(grpc_timeout="200m")
    first, last, end = body.split(b"\n\n")
    assert (status, first, end) == (200, b"data: 1", b"")
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "deadline_exceeded"


async def test_a_stream_that_started_in_time_continues(service):
    """Client libraries limit the wait for the next bytes, not all of it."""

    async def handle(call: HttpCall) -> None:
        for number in range(5):
            await call.send_chunk(b"%d" % number, content_type=_EVENTS)
            await asyncio.sleep(0.1)

    service.handle = handle
    assert await service.post(x_stainless_read_timeout="0.3") == (200, b"01234")


async def test_a_client_that_never_reads_does_not_keep_a_stream_alive(service, monkeypatch):
    """Its error event would wait behind what was sent before: the connection is closed."""
    monkeypatch.setattr(http_call, "ENDING_SECONDS", 0.1)
    done = asyncio.Event()

    async def handle(call: HttpCall) -> None:
        try:
            while True:
                await call.send_chunk(bytes(1 << 20), content_type=_EVENTS)
        finally:
            done.set()

    service.handle = handle
    async with service.http.post("/path", headers=_CALLER | {"grpc-timeout": "300m"}):
        async with asyncio.timeout(5):
            await done.wait()
            (connection,) = service.server._connections
            while connection.task is not None:  # noqa: ASYNC110  # no event says so
                await asyncio.sleep(0.01)


async def test_a_timeout_of_the_handlers_own_is_a_bug(service):
    """It is not the caller's deadline."""

    async def handle(_call: HttpCall) -> None:
        raise TimeoutError

    service.handle = handle
    status, body = await service.post(grpc_timeout="30S")
    assert (status, json.loads(body)["error"]["code"]) == (500, "internal")
