"""The HTTP server of the mesh with one path, and clients that send raw bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop
from typing_extensions import override

from libs.clock import SystemClock
from libs.errors import HeadraceError
from libs.http1 import HttpServer
from libs.http1.connection import Connection
from libs.rpc.access import OPEN
from libs.rpc.http_api import HttpApi, HttpRoute
from libs.rpc.http_call import HttpCall
from libs.rpc.http_dialect import StatusDialect
from tests.support.grpc_over_http import CALLER, Caller

DRAIN_SECONDS = 10.0
PATIENCE_SECONDS = 10.0
TEXT = "text/plain"
# The first lines of a request; headers may follow.
POST = (
    b"POST /path HTTP/1.1\r\nhost: test\r\n"
    + "".join(f"{name}: {text}\r\n" for name, text in CALLER.items()).encode()
)
CHUNKED = b"transfer-encoding: chunked\r\n\r\n"


def post(body: bytes = b"", fields: bytes = b"") -> bytes:
    """Returns a request; `fields` are header lines with line breaks."""
    return b"%b%bcontent-length: %d\r\n\r\n%b" % (POST, fields, len(body), body)


async def echo(call: HttpCall) -> None:
    """Answers with the body of the request."""
    call.respond(call.body, content_type=TEXT)


class EndingDialect(StatusDialect):
    """Ends an incomplete response with a text, as event streams do."""

    @override
    def error_chunk(self, error: HeadraceError) -> bytes | None:
        return f" {error.reason}".encode()


class HttpService:
    """A server with one path.

    Attributes:
        handle: handles requests; the test sets it.
    """

    def __init__(self) -> None:
        self.handle: Callable[[HttpCall], Awaitable[object]] = echo
        clock = SystemClock()
        api = HttpApi(
            routes=[HttpRoute("POST", "/path", self._handle, scope=OPEN)],
            is_ready=lambda: True,
            clock=clock,
            dialect=EndingDialect(),
        )
        self.server = HttpServer("127.0.0.1:0", api, drain_seconds=DRAIN_SECONDS, clock=clock)

    async def _handle(self, call: HttpCall) -> None:
        await self.handle(call)

    @property
    def connections(self) -> set[Connection]:
        """The open connections."""
        return self.server._connections

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, _, port = self.server.address.rpartition(":")
        return host, int(port)

    @asynccontextmanager
    async def caller(self) -> AsyncIterator[Caller]:
        """Connects."""
        reader, writer = await asyncio.open_connection(*self.host_and_port)
        try:
            yield Caller(reader, writer)
        finally:
            writer.transport.abort()


@asynccontextmanager
async def serving_one_path() -> AsyncIterator[HttpService]:
    """Runs a server on a free port."""
    service = HttpService()
    await service.server.start()
    try:
        yield service
    finally:
        service.server._drain_seconds = 0
        await service.server.stop()


# Fixtures for modules that import them.


@pytest.fixture(name="event_loop_policy")
def as_services_run() -> Any:
    return uvloop.EventLoopPolicy()


@pytest.fixture(name="service")
async def one_service() -> AsyncIterator[HttpService]:
    async with serving_one_path() as service:
        yield service


@pytest.fixture(name="caller")
async def one_caller(service: HttpService) -> AsyncIterator[Caller]:
    async with asyncio.timeout(PATIENCE_SECONDS), service.caller() as caller:
        yield caller


async def answer(caller: Caller) -> tuple[int, bytes]:
    """Reads a response without trailers: its status and its body."""
    status, headers = await caller.head()
    if "content-length" in headers:
        return status, await caller.reader.readexactly(int(headers["content-length"]))
    body = b""
    while chunk := await caller.chunk():
        body += chunk
    assert await caller.reader.readexactly(2) == b"\r\n"
    return status, body


async def rest(caller: Caller) -> bytes:
    """Reads until the connection ends."""
    data = b""
    try:
        while more := await caller.reader.read(1 << 16):
            data += more
    except ConnectionError:
        pass
    return data
