"""An HTTP API: what happens around a request, as the edge sees it."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from opentelemetry import trace

from libs.clock import SystemClock
from libs.errors import ResourceExhausted
from libs.http1 import HttpServer
from libs.rpc.access import OPEN
from libs.rpc.http_api import HttpApi, HttpRoute
from libs.rpc.http_call import HttpCall
from libs.rpc.served_call import MAX_REQUEST_BYTES
from libs.telemetry.tracing import current_trace_id
from tests.support.http_bytes import EndingDialect

pytestmark = pytest.mark.integration

CALLER = {"x-headrace-tenant": "acme", "x-headrace-user": "ann", "x-headrace-scopes": "infer"}
TEXT = "text/plain"


class Service:
    """A server with one path, whose handler the test sets.

    Attributes:
        ready: what its health check reports.
    """

    def __init__(self) -> None:
        self.ready = True
        self.handle: Callable[[HttpCall], Awaitable[None]]
        self.http: aiohttp.ClientSession
        clock = SystemClock()
        api = HttpApi(
            routes=[HttpRoute("POST", "/path", self._handle, scope=OPEN)],
            is_ready=lambda: self.ready,
            clock=clock,
            dialect=EndingDialect(),
        )
        self.server = HttpServer("127.0.0.1:0", api, drain_seconds=2.0, clock=clock)

    async def _handle(self, call: HttpCall) -> None:
        await self.handle(call)

    async def post(self, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        data = io.BytesIO(body)
        async with self.http.post("/path", data=data, headers=CALLER | headers) as response:
            return response.status, await response.read()


@asynccontextmanager
async def serving() -> AsyncIterator[Service]:
    service = Service()
    await service.server.start()
    async with aiohttp.ClientSession(f"http://{service.server.address}") as service.http:
        yield service
    await service.server.stop()


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with serving() as service:
        yield service


async def test_a_handler_gets_the_body_and_the_caller(service):
    """And sends one body."""

    async def handle(call: HttpCall) -> None:
        caller = call.identity
        answer = f"{caller.tenant} {caller.user} {sorted(caller.scopes)}".encode()
        call.respond(call.body + answer, content_type=TEXT)

    service.handle = handle
    assert await service.post(b"hello ") == (200, b"hello acme ann ['infer']")


async def test_a_request_continues_the_callers_trace(service):
    """Sampled or not; a request without a trace starts its own."""
    seen = []

    async def handle(call: HttpCall) -> None:
        kept = trace.get_current_span().get_span_context().trace_flags.sampled
        seen.append((current_trace_id(), kept))
        call.respond(b"", content_type=TEXT)

    service.handle = handle
    await service.post(traceparent=f"00-{'a' * 32}-{'b' * 16}-00")
    await service.post(traceparent=f"00-{'c' * 32}-{'d' * 16}-01")
    await service.post(traceparent=f"00-{'0' * 32}-{'0' * 16}-00")
    assert seen[:2] == [("a" * 32, False), ("c" * 32, True)]
    assert seen[2][0] not in ("0" * 32, "a" * 32, "c" * 32)


async def test_what_a_handler_raises_is_a_status_in_json(service):
    """With the details that gRPC has; an unexpected exception shows its trace id only."""

    async def refuse(_call: HttpCall) -> None:
        raise ResourceExhausted("full", reason="QUEUE_FULL", retry_after_seconds=2.5)

    async def break_down(_call: HttpCall) -> None:
        raise RuntimeError("secret")

    service.handle = refuse
    async with service.http.post("/path", headers=CALLER) as response:
        status = await response.json()
    assert response.status == 429
    assert [detail.get("reason") or detail["retry_delay"] for detail in status["details"]] == [
        "QUEUE_FULL",
        "2.500s",
    ]
    service.handle = break_down
    status_code, body = await service.post()
    assert status_code == 500
    assert b'"INTERNAL"' in body
    assert b"secret" not in body


async def test_a_request_without_identity_is_refused(service):
    """Only the edge sets it."""

    async def handle(call: HttpCall) -> None:
        call.respond(call.identity.tenant.encode(), content_type=TEXT)

    service.handle = handle
    async with service.http.post("/path") as response:
        assert response.status == 401


async def test_an_error_ends_a_started_response_and_a_crash_closes_the_connection(service):
    """A response that broke off must not look complete."""

    def failing_with(error: Exception) -> Callable[[HttpCall], Awaitable[None]]:
        async def handle(call: HttpCall) -> None:
            await call.send_chunk(b"half", content_type=TEXT)
            raise error

        return handle

    service.handle = failing_with(ResourceExhausted("full", reason="QUEUE_FULL"))
    assert await service.post() == (200, b"half QUEUE_FULL")
    service.handle = failing_with(RuntimeError("not foreseen"))
    with pytest.raises(aiohttp.ClientError):
        await service.post()


async def test_closing_the_connection_cancels_the_handler(service):
    """At its next await, whatever it waits for."""
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def handle(call: HttpCall) -> None:
        await call.send_chunk(b"a", content_type=TEXT)
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    service.handle = handle
    response = await service.http.post("/path", headers=CALLER)
    await started.wait()
    response.close()
    async with asyncio.timeout(5):
        await cancelled.wait()


async def test_a_slow_reader_slows_the_writer(service):
    """Buffers of the kernel and the transport are limited."""
    written = 0

    async def handle(call: HttpCall) -> None:
        nonlocal written
        for _ in range(1000):
            await call.send_chunk(bytes(1 << 20), content_type=TEXT)
            written += 1

    service.handle = handle
    response = await service.http.post("/path", headers=CALLER)
    before = -1
    async with asyncio.timeout(10):
        while written != before:
            before = written
            await asyncio.sleep(0.3)
    assert written < 100
    response.close()


async def test_a_body_over_the_limit_is_refused(service):
    """The edge refuses it first; services do not rely on that."""

    async def handle(call: HttpCall) -> None:
        call.respond(str(len(call.body)).encode(), content_type=TEXT)

    service.handle = handle
    assert await service.post(bytes(MAX_REQUEST_BYTES)) == (200, str(MAX_REQUEST_BYTES).encode())
    status, body = await service.post(bytes(MAX_REQUEST_BYTES + 1))
    assert status == 400
    assert b"MESSAGE_TOO_LARGE" in body


@pytest.mark.parametrize(("method", "path"), [("GET", "/path"), ("POST", "/elsewhere")])
async def test_other_paths_and_methods_are_unknown(service, method, path):
    """`METHOD_NOT_FOUND`, as for an unknown RPC."""
    async with service.http.request(method, path, headers=CALLER) as response:
        assert response.status == 501
        assert "METHOD_NOT_FOUND" in await response.text()


async def test_health_reports_readiness(service):
    """The edge checks it each second."""
    for ready, status in ((True, 200), (False, 503)):
        service.ready = ready
        async with service.http.get("/healthz") as response:
            assert response.status == status
            body = await response.text()
            assert ("DEPENDENCY_UNAVAILABLE" in body) == (not ready)


async def test_stopping_waits_for_running_requests_and_accepts_no_connections():
    """For as long as the drain lasts."""
    async with serving() as service:
        started, may_end = asyncio.Event(), asyncio.Event()

        async def handle(call: HttpCall) -> None:
            started.set()
            await may_end.wait()
            call.respond(b"done", content_type=TEXT)

        service.handle = handle
        running = asyncio.create_task(service.post())
        await started.wait()
        stopping = asyncio.create_task(service.server.stop())
        await asyncio.sleep(0.1)
        async with aiohttp.ClientSession() as newcomer:
            with pytest.raises(aiohttp.ClientConnectionError):
                await newcomer.post(f"http://{service.server.address}/path")
        may_end.set()
        assert await running == (200, b"done")
        await stopping
