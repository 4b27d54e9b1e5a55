"""A gRPC method over HTTP/1.1, as the edge calls it: bytes, headers and trailers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from libs.errors import NotFound, ResourceExhausted
from libs.rpc import grpc_http1, served_call
from libs.rpc.grpc_http1 import GrpcCall
from libs.rpc.status import to_status
from tests.support.grpc_over_http import (
    METHOD,
    Caller,
    Service,
    calls_counted,
    echo,
    framed,
    serving_method,
)
from tests.support.rpc import value

pytestmark = pytest.mark.integration

_PATIENCE_SECONDS = 10.0


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with serving_method() as service:
        yield service


@pytest.fixture
async def caller(service: Service) -> AsyncIterator[Caller]:
    async with service.caller() as caller:
        yield caller


def failing(error: Exception, *texts: str) -> Any:
    async def handle(_request: Any, context: GrpcCall) -> None:
        for text in texts:
            await context.write(value(text))
        raise error

    return handle


def waiting(cancelled: asyncio.Event, *texts: str) -> Any:
    async def handle(_request: Any, context: GrpcCall) -> None:
        for text in texts:
            await context.write(value(text))
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    return handle


async def test_a_response_is_messages_in_chunks_and_a_status_in_trailers(service, caller):
    """Each message is a chunk, sent before the next one exists."""
    may_go_on = asyncio.Semaphore(0)

    async def handle(request: StringValue, context: GrpcCall) -> None:
        for _ in range(3):
            await context.write(request)
            await may_go_on.acquire()

    service.handle = handle
    message = value("hello").SerializeToString()
    caller.send(framed(message))
    http_status, headers = await caller.head()
    assert (http_status, headers["content-type"]) == (200, "application/grpc")
    assert "grpc-status" not in headers
    for _ in range(3):
        assert await caller.chunk() == framed(message)
        may_go_on.release()
    assert await caller.chunk() == b""
    assert await caller.reader.readuntil(b"\r\n\r\n") == b"grpc-status: 0\r\n\r\n"


async def test_messages_can_leave_together(service, caller):
    """In one chunk and one write, in their order."""

    async def handle(request: StringValue, context: GrpcCall) -> None:
        await context.write_together([request, value("b")])

    service.handle = handle
    first, second = (framed(value(text).SerializeToString()) for text in ("a", "b"))
    caller.send(first)
    await caller.head()
    assert await caller.chunk() == first + second


async def test_an_answer_may_have_no_message(service, caller):
    """Then the status stands in the headers, and nothing follows."""


async def test_a_response_may_have_no_message(service, caller):
    """Then the status is in the headers."""

    async def handle(_request: Any, _context: GrpcCall) -> None:
        pass

    service.handle = handle
    answer = await caller.call()
    assert (answer.headers["grpc-status"], answer.messages) == ("0", [])
    assert answer.headers["content-type"] == "application/grpc"


@pytest.mark.parametrize("texts", [(), ("a", "b")], ids=["before a message", "after two"])
async def test_an_error_is_the_status_of_grpc_with_its_details(service, caller, texts):
    """In the headers if there are no messages, otherwise in the trailers."""
    error = ResourceExhausted(
        "100 % größer\n", reason="QUEUE_FULL", retry_after_seconds=2.5, metadata={"limit": "4"}
    )
    service.handle = failing(error, *texts)
    answer = await caller.call()
    assert (answer.http_status, answer.messages) == (200, list(texts))
    assert answer.status == to_status(error)
    found = answer.trailers if texts else answer.headers
    assert found["grpc-message"].split("%20") == ["100", "%25", "gr%C3%B6%C3%9Fer%0A"]


@pytest.mark.parametrize("texts", [(), ("a",)])
async def test_an_unexpected_exception_is_internal_and_leaks_nothing(service, caller, texts):
    """The log has the details."""
    service.handle = failing(RuntimeError("secret"), *texts)
    answer = await caller.call()
    assert (answer.status.code, answer.reason) == (13, "INTERNAL")
    assert "secret" not in str(answer.status)
    assert answer.messages == list(texts)


async def test_a_connection_is_reused_however_a_response_ended(service, caller):
    """The edge keeps one for each running call, and opens none for each new call."""
    error = NotFound("none", reason="MODEL_NOT_FOUND")
    for handle, code in (
        (echo, 0),
        (failing(error, "a"), 5),
        (failing(error), 5),
        (failing(RuntimeError(), "a"), 13),
        (echo, 0),
    ):
        service.handle = handle
        assert (await caller.call()).status.code == code
    assert (await caller.call(b"")).status.code == 3
    assert (await caller.call(framed(value("again").SerializeToString()))).messages == ["again"]


@pytest.mark.parametrize("texts", [(), ("a",)])
async def test_a_deadline_that_passes_ends_the_handler(service, caller, texts):
    """The caller gets the status, in headers or trailers, and the work is cancelled."""
    cancelled = asyncio.Event()
    service.handle = waiting(cancelled, *texts)
    async with asyncio.timeout(_PATIENCE_SECONDS):
        answer = await caller.call(grpc_timeout="200m")
    assert (answer.status.code, answer.reason) == (4, "DEADLINE_EXCEEDED")
    assert answer.messages == list(texts)
    assert cancelled.is_set()


async def test_calls_are_counted_by_method_and_status(service, caller):
    """In the same metrics as calls over HTTP/2."""
    for status, handle in (
        ("OK", echo),
        ("NOT_FOUND", failing(NotFound("none", reason="MODEL_NOT_FOUND"), "a")),
        ("INTERNAL", failing(RuntimeError())),
    ):
        before = calls_counted(status)
        service.handle = handle
        await caller.call()
        await service.answered.acquire()
        assert calls_counted(status) == before + 1


@pytest.mark.parametrize(
    ("error", "status"),
    [(NotFound("none", reason="MODEL_NOT_FOUND"), "NOT_FOUND"), (RuntimeError(), "INTERNAL")],
)
async def test_a_call_is_a_span_in_its_callers_trace(service, caller, monkeypatch, error, status):
    """With gRPC's attributes; only server faults set the span's status to error."""
    provider, spans = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(served_call, "_tracer", provider.get_tracer("test"))
    service.handle = failing(error, "a")
    await caller.call(traceparent=f"00-{'a' * 32}-{'b' * 16}-01")
    await service.answered.acquire()
    (span,) = spans.get_finished_spans()
    assert (span.name, span.kind) == (METHOD, trace.SpanKind.SERVER)
    assert span.parent is not None
    assert (span.parent.trace_id, span.parent.span_id) == (int("a" * 32, 16), int("b" * 16, 16))
    assert dict(span.attributes or {}) == {
        "rpc.system": "grpc",
        "rpc.service": "headrace.test.v1.TestService",
        "rpc.method": "Stream",
        "rpc.grpc.status_code": grpc.StatusCode[status].value[0],
    }
    assert (span.status.status_code is trace.StatusCode.ERROR) == (status == "INTERNAL")


async def test_a_method_is_called_by_post_only(service, caller):
    """Other requests are not gRPC, and get JSON."""
    service.handle = echo
    caller.send(b"", verb="GET")
    http_status, headers = await caller.head()
    body = json.loads(await caller.reader.readexactly(int(headers["content-length"])))
    assert (http_status, body["details"][0]["reason"]) == (501, "METHOD_NOT_FOUND")


async def test_closing_the_connection_cancels_the_handler(service):
    """While it waits for something other than the client."""
    before = calls_counted("CANCELLED")
    cancelled = asyncio.Event()
    service.handle = waiting(cancelled, "a")
    async with service.caller() as caller:
        caller.send()
        await caller.head()
    async with asyncio.timeout(_PATIENCE_SECONDS):
        await service.answered.acquire()
    assert cancelled.is_set()
    assert calls_counted("CANCELLED") == before + 1


async def write_for_ever(_request: Any, context: GrpcCall) -> None:
    while True:
        await context.write(value("x" * 100_000))


async def test_a_write_to_a_closed_connection_is_a_cancellation(service):
    """The write may notice before the event loop does."""
    before = calls_counted("CANCELLED")
    closed = asyncio.Event()

    async def handle(request: Any, context: GrpcCall) -> None:
        await context.write(value("a"))
        await closed.wait()
        await write_for_ever(request, context)

    service.handle = handle
    async with service.caller() as caller:
        caller.send()
        await caller.head()
        caller.writer.transport.abort()
        closed.set()  # it goes on in the turn of the loop in which the connection is closed
    async with asyncio.timeout(_PATIENCE_SECONDS):
        await service.answered.acquire()
    assert calls_counted("CANCELLED") == before + 1


async def test_a_client_that_never_reads_does_not_keep_a_failed_call(service, monkeypatch):
    """The status would wait behind earlier messages: the connection is closed after a while."""
    monkeypatch.setattr(grpc_http1, "ENDING_SECONDS", 0.1)
    before = calls_counted("DEADLINE_EXCEEDED")
    service.handle = write_for_ever
    async with service.caller() as caller:
        caller.send(grpc_timeout="500m")
        async with asyncio.timeout(4.0):  # less than without the patch
            await service.answered.acquire()
        assert calls_counted("DEADLINE_EXCEEDED") == before + 1
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await caller.answer()
