"""Requests over HTTP/1.1 that arrive byte by byte, or not at all, and bodies of unknown codings."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator

import pytest

from libs.http1 import ArrivalLimits
from libs.rpc.served_call import MAX_REQUEST_BYTES
from tests.support.grpc_over_http import Caller
from tests.support.http_bytes import (
    CHUNKED,
    POST,
    HttpService,
    answer,
    post,
    rest,
    serving_one_path,
)
from tests.support.scripted import scripted_mesh

pytestmark = pytest.mark.integration

IDLE_SECONDS = 0.3
RATE = 2000.0
_MARGIN_SECONDS = 5.0  # a busy machine


@pytest.fixture
async def service() -> AsyncIterator[HttpService]:
    async with serving_one_path() as service:
        service.server._arrival_limits = ArrivalLimits(IDLE_SECONDS, RATE)
        yield service


@pytest.fixture
async def caller(service: HttpService) -> AsyncIterator[Caller]:
    async with asyncio.timeout(20), service.caller() as caller:
        yield caller


async def drip(caller: Caller, data: bytes, *, each_seconds: float) -> None:
    """Sends a byte now and then, until the server ends the connection."""
    try:
        for position in range(len(data)):
            caller.writer.write(data[position : position + 1])
            await caller.writer.drain()
            await asyncio.sleep(each_seconds)
    except ConnectionError:
        pass


def seconds() -> float:
    return asyncio.get_running_loop().time()


@pytest.mark.parametrize("body", [b"", b"abc"], ids=["no byte", "some bytes"])
async def test_a_body_that_stops_arriving_ends_with_408(caller, body):
    """In the form of all errors, and the connection is closed."""
    began = seconds()
    caller.writer.write(POST + b"content-length: 100\r\n\r\n" + body)
    status, text = await answer(caller)
    assert status == 408
    assert json.loads(text)["details"][0]["reason"] == "DEADLINE_EXCEEDED"
    assert IDLE_SECONDS <= seconds() - began < IDLE_SECONDS + _MARGIN_SECONDS
    assert await rest(caller) == b""


@pytest.mark.parametrize(
    ("head", "part"),
    [(b"content-length: 90000\r\n\r\n", b"x"), (CHUNKED, b"1\r\nx\r\n")],
    ids=["length", "chunks"],
)
async def test_a_body_that_drips_ends_although_it_never_pauses(caller, head, part):
    """The average rate counts once the idle time has passed."""
    caller.writer.write(POST + head)
    dripping = asyncio.ensure_future(drip(caller, part * 10_000, each_seconds=0.01))
    began = seconds()
    status, _ = await answer(caller)
    assert status == 408
    assert seconds() - began < IDLE_SECONDS + _MARGIN_SECONDS
    dripping.cancel()


async def test_a_head_that_drips_ends_with_408(caller):
    """No application has seen the request yet."""
    dripping = asyncio.ensure_future(drip(caller, POST + b"x-a: " + b"b" * 9000, each_seconds=0.01))
    assert (await caller.head())[0] == 408
    dripping.cancel()


async def test_a_body_that_arrives_in_time_is_answered(caller):
    """Also where it takes longer than the idle time, at more than the lowest rate."""
    body = bytes(4000)
    caller.writer.write(post(body)[: -len(body)])
    for start in range(0, len(body), 1000):
        await asyncio.sleep(IDLE_SECONDS / 2)
        caller.writer.write(body[start : start + 1000])
    assert await answer(caller) == (200, body)
    await asyncio.sleep(2 * IDLE_SECONDS)  # an idle connection is another matter
    caller.writer.write(post(b"again"))
    assert await answer(caller) == (200, b"again")


async def test_a_slow_request_behind_one_that_runs_does_not_break_its_response(service, caller):
    """The connection is closed after the response."""
    go_on = asyncio.Event()

    async def handle(call):
        await go_on.wait()
        call.respond(b"done", content_type="text/plain")

    service.handle = handle
    caller.writer.write(post(b"first") + POST + b"content-length: 100\r\n\r\n")
    await asyncio.sleep(3 * IDLE_SECONDS)
    go_on.set()
    assert await answer(caller) == (200, b"done")
    assert await rest(caller) == b""


@pytest.mark.parametrize(
    "coding",
    [b"gzip", b"gzip, chunked", b"identity", b"chunked;a=b", b"gzip\r\nTransfer-Encoding: chunked"],
)
async def test_a_body_of_an_unknown_coding_is_not_implemented(caller, coding):
    """It would be passed on as it is (RFC 9112, 6.1)."""
    caller.writer.write(POST + b"transfer-encoding: " + coding + b"\r\n\r\n0\r\n\r\n")
    assert (await caller.head())[0] == 501
    assert await rest(caller) == b""


async def test_the_edge_knows_no_other_codings_either(tmp_path):
    """With a reason in the form of the path's API."""
    async with scripted_mesh(tmp_path) as mesh:
        host, _, port = mesh.edge.address.rpartition(":")
        for path in ("/v1/chat/completions", "/headrace.cost.v1.CostService/ListPrices"):
            reader, writer = await asyncio.open_connection(host, int(port))
            head = f"POST {path} HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n"
            writer.write(head.encode())
            async with asyncio.timeout(10):
                assert b" 501 " in await reader.readline()
            writer.transport.abort()


async def test_a_body_in_chunks_of_one_byte_takes_no_more_memory_than_its_size(service, caller):
    """A list of them would take forty times as much."""
    caller.writer.write(POST + CHUNKED)
    size = MAX_REQUEST_BYTES // 8
    tracemalloc.start()
    try:
        for _ in range(64):
            caller.writer.write(b"1\r\nx\r\n" * (size // 64))
            await caller.writer.drain()
        caller.writer.write(b"0\r\n\r\n")
        status, body = await answer(caller)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (status, len(body)) == (200, size)
    assert peak_bytes < 12 * size
