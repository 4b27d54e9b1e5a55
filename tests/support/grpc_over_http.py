"""A gRPC method over HTTP/1.1 that a test defines, and a client like the edge."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import error_details_pb2, status_pb2
from prometheus_client import REGISTRY
from typing_extensions import override

from libs.clock import SystemClock
from libs.http1 import Exchange
from libs.rpc.access import OPEN
from libs.rpc.grpc_http1 import Behavior, GrpcCall, GrpcHttp1Handler
from tests.support.edge import serving_http

METHOD = "headrace.test.v1.TestService/Stream"
CALLER = {"x-headrace-tenant": "acme", "x-headrace-user": "ann", "x-headrace-scopes": "infer"}


def framed(message: bytes, *, compressed: bool = False) -> bytes:
    """Returns a message with its prefix."""
    return struct.pack(">BI", compressed, len(message)) + message


@dataclass(frozen=True)
class Answer:
    """A response; names of headers and trailers are in lower case."""

    http_status: int
    headers: dict[str, str]
    messages: list[str]
    trailers: dict[str, str]

    @property
    def status(self) -> status_pb2.Status:
        """The gRPC status, from the headers or the trailers."""
        assert ("grpc-status" in self.headers) != ("grpc-status" in self.trailers)
        found = self.headers | self.trailers
        encoded = found.get("grpc-status-details-bin", "")
        status = status_pb2.Status.FromString(base64.b64decode(encoded + "=" * (-len(encoded) % 4)))
        assert status.code == int(found["grpc-status"])
        return status

    @property
    def reason(self) -> str:
        info = error_details_pb2.ErrorInfo()
        assert self.status.details[0].Unpack(info)
        return str(info.reason)


class Caller:
    """A client with one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def call(self, body: bytes = framed(b""), /, **headers: str) -> Answer:
        """Sends a request and reads the response."""
        self.send(body, **headers)
        return await self.answer()

    def send(self, body: bytes = framed(b""), /, verb: str = "POST", **headers: str) -> None:
        """Sends a request; an underscore in a header's name stands for a hyphen."""
        lines = [f"{verb} /{METHOD} HTTP/1.1", "host: test", "content-type: application/grpc"]
        named = CALLER | {name.replace("_", "-"): text for name, text in headers.items()}
        lines += [f"{name}: {text}" for name, text in named.items()]
        lines.append(f"content-length: {len(body)}")
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    async def answer(self) -> Answer:
        """Reads a response.

        Raises:
            asyncio.IncompleteReadError, ConnectionError: the connection was closed.
        """
        http_status, headers = await self.head()
        if "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
            return Answer(http_status, headers, _messages(body), {})
        assert headers["transfer-encoding"] == "chunked"
        body = b""
        while chunk := await self.chunk():
            body += chunk
        return Answer(http_status, headers, _messages(body), await self._fields())

    async def head(self) -> tuple[int, dict[str, str]]:
        """Reads status and headers."""
        version, http_status, _ = (await self.reader.readuntil(b"\r\n")).decode().split(" ", 2)
        assert version == "HTTP/1.1"
        return int(http_status), await self._fields()

    async def chunk(self) -> bytes:
        """Reads a chunk; the last is empty."""
        length = int(await self.reader.readuntil(b"\r\n"), 16)
        if not length:
            return b""
        chunk = await self.reader.readexactly(length)
        assert await self.reader.readexactly(2) == b"\r\n"
        return chunk

    async def _fields(self) -> dict[str, str]:
        fields = {}
        while line := (await self.reader.readuntil(b"\r\n")).decode("ascii").strip():
            name, _, text = line.partition(":")
            assert name.lower() not in fields
            fields[name.lower()] = text.strip()
        return fields


class Service:
    """A server with one method.

    Attributes:
        handle: handles the method; the test sets it.
        answered: a semaphore, released after each call, when the call is counted.
    """

    def __init__(self) -> None:
        self.handle: Behavior
        self.answered = asyncio.Semaphore(0)
        self.address = ""

    @asynccontextmanager
    async def caller(self) -> AsyncIterator[Caller]:
        """Connects."""
        host, _, port = self.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            yield Caller(reader, writer)
        finally:
            writer.transport.abort()

    async def run(self, request: Message, context: GrpcCall) -> None:
        await self.handle(request, context)


class _Method(GrpcHttp1Handler):
    """Reports the end of each call."""

    def __init__(self, service: Service) -> None:
        clock = SystemClock()
        super().__init__(
            f"/{METHOD}",
            service.run,
            request_type=StringValue,
            clock=clock,
            scope_of=lambda _: OPEN,
        )
        self._service = service

    @override
    async def answer(self, exchange: Exchange) -> None:
        try:
            await super().answer(exchange)
        finally:
            self._service.answered.release()


@asynccontextmanager
async def serving_method() -> AsyncIterator[Service]:
    """Runs a server on a free port."""
    service = Service()
    async with serving_http(grpc_methods=[_Method(service)]) as service.address:
        yield service


async def echo(request: Message, context: GrpcCall) -> None:
    """Answers with the request."""
    await context.write(request)


def calls_counted(status: str, method: str = METHOD) -> float:
    """Returns the number of calls that ended with a status code."""
    labels: dict[str, Any] = {"grpc_method": method, "grpc_status": status}
    return REGISTRY.get_sample_value("grpc_server_call_duration_seconds_count", labels) or 0.0


def _messages(body: bytes) -> list[str]:
    found = []
    while body:
        compressed, length = struct.unpack(">BI", body[:5])
        assert not compressed
        found.append(StringValue.FromString(body[5 : 5 + length]).value)
        body = body[5 + length :]
    return found
