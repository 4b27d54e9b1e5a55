"""Requests with two meanings: the edge refuses them, or service and edge see the same meaning.

Each is sent as raw bytes. Behind it, on the same connection, comes a request that a service must
not see as part of the first one, nor the other way round.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from libs.openai.bodies import CHAT_COMPLETIONS_PATH
from tests.support.scripted import ScriptedMesh, one_object, scripted_mesh

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

_PATIENCE_SECONDS = 10.0
_HIDDEN = b"GET /v1/models HTTP/1.1\r\nHost: edge\r\n\r\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory) -> AsyncIterator[ScriptedMesh]:
    async with scripted_mesh(tmp_path_factory.mktemp("edge")) as mesh:
        yield mesh


@pytest.fixture
def mesh(running: ScriptedMesh) -> ScriptedMesh:
    running.chat.answer = one_object
    running.chat.body = b""
    return running


async def _answers(mesh: ScriptedMesh, data: bytes) -> list[bytes]:
    """Sends bytes and returns the status lines of all answers, until the edge closes or is idle."""
    host, _, port = mesh.edge.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    received = b""
    try:
        writer.write(data)
        async with asyncio.timeout(1.0):
            while more := await reader.read(1 << 16):
                received += more
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.transport.abort()
    return [line for line in received.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]


def _post(
    mesh: ScriptedMesh, fields: bytes, body: bytes, path: str = CHAT_COMPLETIONS_PATH
) -> bytes:
    authorization = mesh.edge.bearer()["authorization"].encode()
    return (
        b"POST %b HTTP/1.1\r\nHost: edge\r\ncontent-type: application/json\r\n"
        b"authorization: %b\r\n%b\r\n%b" % (path.encode(), authorization, fields, body)
    )


@pytest.mark.parametrize(
    "fields",
    [
        b"content-length: 2\r\ntransfer-encoding: chunked\r\n",
        b"transfer-encoding: chunked\r\ncontent-length: 2\r\n",
        b"content-length: 2\r\ncontent-length: 3\r\n",
        b"content-length: 2, 3\r\n",
        b"content-length: +2\r\n",
        b"content-length: 0x2\r\n",
        b"content-length: -1\r\n",
        b"transfer-encoding: gzip\r\n",
        b"transfer-encoding: gzip, chunked\r\n",
        b"transfer-encoding: chunked, gzip\r\n",
        b"transfer-encoding: xchunked\r\n",
        b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n",
        b"transfer-encoding : chunked\r\n",
        b"content-length : 2\r\n",
        b"transfer-encoding:\x0bchunked\r\n",
        b"x: y\n transfer-encoding: chunked\r\ncontent-length: 2\x00\r\n",
        b"x\r\n folded: y\r\ncontent-length: 2\r\n",
    ],
)
async def test_bodies_with_two_lengths_are_refused(mesh: ScriptedMesh, fields: bytes) -> None:
    """Nothing of them, and nothing behind them, reaches a service."""
    found = await _answers(mesh, _post(mesh, fields, b"0\r\n\r\n" + _HIDDEN))
    assert len(found) <= 1
    assert all(line[9:12] in (b"400", b"501") for line in found), found
    assert mesh.chat.body == b""


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        (b"content-length: 2\r\n", b"{}"),
        (b"transfer-encoding: chunked\r\n", b"2\r\n{}\r\n0\r\n\r\n"),
    ],
)
async def test_a_request_behind_another_is_one_of_its_own(
    mesh: ScriptedMesh, fields: bytes, body: bytes
) -> None:
    """It needs a token of its own."""
    found = await _answers(mesh, _post(mesh, fields, body + _HIDDEN))
    assert [line[9:12] for line in found] == [b"200", b"401"]
    assert mesh.chat.body == b"{}"


@pytest.mark.parametrize(
    "path",
    [
        "//v1/chat/completions",
        "/v1//chat/completions",
        "/v1/./chat/completions",
        "/healthz/../v1/chat/completions",
        "/healthz/%2e%2e/v1/chat/completions",
        "/healthz%2f..%2fv1/chat/completions",
        "/healthz;/../v1/chat/completions",
        "/v1/chat/completions/",
        "/v1/chat/completions;a=b",
        "/V1/chat/completions",
        "/v1/chat/completions%00",
        "/v1/chat/completions%20",
        "/v1\\chat\\completions",
        "/grpc.health.v1.Health/Check/../../v1/chat/completions",
        "http://other/v1/chat/completions/x",
    ],
)
async def test_other_spellings_of_a_path_are_other_paths(mesh: ScriptedMesh, path: str) -> None:
    """Without a token none is open, and with one none is the path that it resembles."""
    body = b"{}"
    length = b"content-length: 2\r\n"
    open_request = b"POST %b HTTP/1.1\r\nHost: edge\r\n%b\r\n%b" % (path.encode(), length, body)
    for request in (open_request, _post(mesh, length, body, path)):
        async with asyncio.timeout(_PATIENCE_SECONDS):
            found = await _answers(mesh, request)
        assert found, path
        assert found[0][9:12] in (b"400", b"401", b"404"), (path, found)
    assert mesh.chat.body == b""
