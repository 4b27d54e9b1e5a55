"""What a gRPC method over HTTP/1.1 accepts as a request, and what it reads from headers."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
import zlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import StringValue

from libs.rpc.grpc_http1 import GrpcCall
from libs.rpc.identity import identity_of
from libs.rpc.served_call import MAX_REQUEST_BYTES
from tests.support.grpc_over_http import Caller, Service, echo, framed, serving_method
from tests.support.rpc import value

pytestmark = pytest.mark.integration


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with serving_method() as service:
        yield service


@pytest.fixture
async def caller(service: Service) -> AsyncIterator[Caller]:
    async with service.caller() as caller:
        yield caller


GZIPPED = gzip.compress(value("x" * 10_000).SerializeToString())
BOMB = gzip.compress(bytes(64 * MAX_REQUEST_BYTES))
LARGE = framed(value("x" * (MAX_REQUEST_BYTES - 4)).SerializeToString())  # by one byte
TEXT = value("text").SerializeToString()


def packed(message: bytes) -> bytes:
    return framed(message, compressed=True)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        pytest.param((b"", ""), (3, "INVALID_FIELD"), id="no message"),
        pytest.param((b"\0\0\0", ""), (3, "INVALID_FIELD"), id="half a prefix"),
        pytest.param((framed(TEXT)[:-1], ""), (3, "INVALID_FIELD"), id="half a message"),
        pytest.param((framed(TEXT) * 2, ""), (3, "INVALID_FIELD"), id="two messages"),
        pytest.param((framed(TEXT) + TEXT, ""), (3, "INVALID_FIELD"), id="more than a message"),
        pytest.param((framed(b"\xff"), ""), (3, "INVALID_FIELD"), id="not a protobuf"),
        pytest.param((packed(TEXT), "gzip"), (3, "INVALID_FIELD"), id="not gzip"),
        pytest.param((packed(GZIPPED[:-9]), "gzip"), (3, "INVALID_FIELD"), id="half of a gzip"),
        pytest.param((packed(TEXT), "br"), (12, "INVALID_FIELD"), id="no encoding that we know"),
        pytest.param((packed(TEXT), ""), (12, "INVALID_FIELD"), id="no encoding"),
        pytest.param((packed(BOMB), "gzip"), (3, "MESSAGE_TOO_LARGE"), id="a bomb"),
        pytest.param((LARGE, ""), (3, "MESSAGE_TOO_LARGE"), id="too large"),
    ],
)
async def test_a_request_that_cannot_be_read_is_refused(service, caller, sent, status):
    """No handler is called."""
    body, encoding = sent
    handled = asyncio.Event()

    async def handle(_request: Any, _context: GrpcCall) -> None:
        handled.set()

    service.handle = handle
    answer = await caller.call(body, **({"grpc_encoding": encoding} if encoding else {}))
    assert (answer.status.code, answer.reason) == status
    assert not handled.is_set()


async def test_a_compression_bomb_is_not_decompressed_fully(service, caller):
    """Only up to the limit; this one would have 256 MiB."""
    service.handle = echo
    tracemalloc.start()
    try:
        await caller.call(packed(BOMB), grpc_encoding="gzip")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 * MAX_REQUEST_BYTES


@pytest.mark.parametrize(
    ("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
async def test_a_request_may_be_compressed(service, caller, encoding, compress):
    """A message without the flag is not compressed, whatever the header says."""
    service.handle = echo
    for body in (packed(compress(TEXT)), framed(TEXT)):
        assert (await caller.call(body, grpc_encoding=encoding)).messages == ["text"]


async def test_the_longest_message_passes(service, caller):
    """Compressed or not; the prefix does not count."""

    async def handle(request: StringValue, context: GrpcCall) -> None:
        await context.write(value(str(request.ByteSize())))

    service.handle = handle
    message = value("x" * (MAX_REQUEST_BYTES - 5)).SerializeToString()
    assert len(message) == MAX_REQUEST_BYTES
    zipped = packed(gzip.compress(message))
    for body, encoding in ((framed(message), "identity"), (zipped, "gzip")):
        answer = await caller.call(body, grpc_encoding=encoding)
        assert answer.messages == [str(MAX_REQUEST_BYTES)]


async def test_the_identity_is_in_the_headers(service, caller):
    """The edge copies it from the token."""

    async def handle(_request: Any, context: Any) -> None:
        identity = identity_of(context)
        await context.write(value(f"{identity.tenant} {identity.user} {sorted(identity.scopes)}"))

    service.handle = handle
    assert (await caller.call()).messages == ["acme ann ['infer']"]
    unnamed = await caller.call(x_headrace_tenant="")
    assert (unnamed.status.code, unnamed.reason) == (16, "TOKEN_INVALID")


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [("1H", 3600), ("2M", 120), ("30S", 30), ("40000m", 40), ("50000000u", 50)],
)
async def test_the_handler_knows_how_long_its_caller_waits(service, caller, timeout, seconds):
    """None if the caller does not say."""
    remaining: list[float | None] = []

    async def handle(_request: Any, context: GrpcCall) -> None:
        remaining.append(context.time_remaining())

    service.handle = handle
    await caller.call()
    await caller.call(grpc_timeout=timeout)
    unlimited, limited = remaining
    assert unlimited is None
    assert limited is not None
    assert seconds - 5 < limited <= seconds


@pytest.mark.parametrize(
    "timeout", ["x", "", "S", "5", "-1S", "1.5S", "123456789S", "9" * 5000 + "m"]
)
async def test_a_timeout_that_cannot_be_read_is_refused(service, caller, timeout):
    """A caller with a deadline must not wait without one because of a typing error."""
    service.handle = echo
    answer = await caller.call(grpc_timeout=timeout)
    assert (answer.status.code, answer.reason) == (3, "INVALID_FIELD")
    assert "grpc-timeout" in answer.status.message
