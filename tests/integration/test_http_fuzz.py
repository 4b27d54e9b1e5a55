"""The HTTP/1.1 server survives any bytes, and answers requests after them."""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from libs.errors import NotFound
from libs.rpc.http_call import HttpCall
from tests.support.http_bytes import CHUNKED, POST, TEXT, HttpService, answer, post

pytestmark = pytest.mark.integration

_UPGRADE = b"connection: upgrade\r\nupgrade: h2c\r\n"
_SEEDS = (
    post(b"echo"),
    post(b"stream"),
    post(b"refuse"),
    post(b"crash"),
    post(b"echo", b"connection: close\r\n"),
    post(b"echo", b"expect: 100-continue\r\n"),
    post(b"echo", _UPGRADE),
    post(b"echo", b"grpc-timeout: 1S\r\n"),
    POST + CHUNKED + b"4\r\necho\r\n0\r\n\r\n",
    POST + CHUNKED + b"6;a=b\r\nstream\r\n0\r\ntrailer: a\r\n\r\n",
    POST + _UPGRADE + CHUNKED + b"4\r\necho\r\n0\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n",
    b"GET /none?a=b HTTP/1.1\r\nhost: a\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n",
)
_TOKENS = (
    *(b"\r\n", b"\n", b"\r", b":", b" ", b"\t", b"\0", b"\xff", b"0", b"-1", b"ffffffffffffffff"),
    *(b"HTTP/1.0", b"HTTP/2.0", b"host: b\r\n", b"content-length: 5\r\n", b"upgrade: h2c\r\n"),
    *(
        b"transfer-encoding: chunked\r\n",
        b"transfer-encoding: gzip\r\n",
        b"expect: 100-continue\r\n",
    ),
    *(b"x-headrace-tenant: b\r\n", b"grpc-timeout: x\r\n", b"connection: close\r\n", b"0\r\n\r\n"),
)

# Where it starts, how many bytes it replaces, and with what.
_Edit = tuple[float, int, bytes]
_EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 8), st.sampled_from(_TOKENS) | st.binary(max_size=4)),
    max_size=4,
)


def _edited(data: bytes, edits: list[_Edit]) -> bytes:
    for start, length, inserted in edits:
        position = int(start * len(data))
        data = data[:position] + inserted + data[position + length :]
    return data


_REQUESTS = st.builds(
    _edited, st.lists(st.sampled_from(_SEEDS), min_size=1, max_size=4).map(b"".join), _EDITS
)
_BYTES = _REQUESTS | st.binary(max_size=256)


class Responses:
    """Parses responses strictly."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self._parser = httptools.HttpResponseParser(self)

    def on_headers_complete(self) -> None:
        self.statuses.append(self._parser.get_status_code())

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)


async def _handle(call: HttpCall) -> None:
    if call.body.startswith(b"stream"):
        await call.send_chunk(b"a", content_type=TEXT)
        await asyncio.sleep(0)
        await call.send_chunk(b"b", content_type=TEXT)
    elif call.body.startswith(b"refuse"):
        raise NotFound.of_resource("a")
    elif call.body.startswith(b"crash"):
        raise RuntimeError("a bug")
    else:
        call.respond(call.body, content_type=TEXT)


async def _send(service: HttpService, parts: list[bytes]) -> bytes:
    """Sends bytes on a connection of their own; returns all that comes back."""
    received = b""
    async with service.caller() as caller:
        for part in parts:
            caller.writer.write(part)
            await asyncio.sleep(0)
        for _ in range(3):  # it may take a turn of the loop until a request is started
            await asyncio.sleep(0.001)
            while any(one.task for one in service.connections):  # noqa: ASYNC110  # no event
                await asyncio.sleep(0)
        caller.writer.write_eof()
        try:
            while data := await caller.reader.read(1 << 16):
                received += data
        except ConnectionError:
            pass  # it was refused in the middle of a response
    return received


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=_BYTES, cuts=st.lists(st.floats(0, 1), max_size=5))
async def test_any_bytes_are_answered_or_refused(data: bytes, cuts: list[float]) -> None:
    """Every response can be parsed, no exception is lost, and the server goes on."""
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    ends = sorted({int(cut * len(data)) for cut in cuts} | {len(data)})
    parts = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    service = HttpService()
    service.handle = _handle
    service.server._drain_seconds = 0
    await service.server.start()
    try:
        async with asyncio.timeout(10):
            received = await _send(service, parts)
            async with service.caller() as caller:
                caller.writer.write(post(b"good"))
                assert await answer(caller) == (200, b"good")
    finally:
        await service.server.stop()
    responses = Responses()
    responses.feed(received)
    assert set(responses.statuses) <= {100, 200, 400, 404, 500, 501}
    assert failures == []
