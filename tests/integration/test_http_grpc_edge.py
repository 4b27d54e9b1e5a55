"""gRPC's own client calls a method over HTTP/1.1 through a real edge, without a difference."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import grpc
import hpack
import pytest
import pytest_asyncio
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc

from libs.errors import BY_CODE, DeadlineExceeded, InvalidArgument
from libs.rpc import deadlines
from libs.rpc.framing import framed
from libs.rpc.grpc_http1 import GrpcCall
from libs.rpc.identity import identity_of
from libs.rpc.served_call import MAX_REQUEST_BYTES
from libs.rpc.status import headrace_errors
from tests.support import http2_frames as frames
from tests.support.grpc_over_http import calls_counted
from tests.support.http2_frames import FrameType
from tests.support.rpc import reason_of
from tests.support.scripted import GENERATE_PATH, ScriptedMesh, scripted_mesh, two_deltas

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

_PATIENCE_SECONDS = 15.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory) -> AsyncIterator[ScriptedMesh]:
    async with scripted_mesh(tmp_path_factory.mktemp("edge")) as mesh:
        yield mesh


@pytest.fixture
def mesh(running: ScriptedMesh) -> ScriptedMesh:
    running.inference.generate = two_deltas
    running.inference.calls = 0
    return running


def _generate(mesh: ScriptedMesh, model: str = "m", **options: Any) -> Any:
    stub = inference_pb2_grpc.InferenceServiceStub(mesh.channel)
    request = inference_pb2.GenerateRequest(model=model)
    return stub.Generate(request, metadata=mesh.edge.metadata(), **options)


async def _texts(call: Any) -> list[str]:
    return [message.delta.text async for message in call]


def _delta(text: str) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text=text))


def _failing(error: Exception, *texts: str) -> Any:
    async def generate(_request: Any, _context: Any) -> AsyncIterator[Any]:
        for text in texts:
            yield _delta(text)
        raise error

    return generate


async def _forever(_request: Any, _context: Any) -> AsyncIterator[Any]:
    yield _delta("a")
    await asyncio.Event().wait()


@pytest.mark.parametrize("texts", [(), ("a", "b")], ids=["at once", "after two messages"])
@pytest.mark.parametrize("kind", BY_CODE.values(), ids=BY_CODE)
async def test_every_error_arrives_as_the_class_it_was_raised_as(
    mesh: ScriptedMesh, kind, texts
) -> None:
    """With its details, after the messages sent before; with any characters in its message."""
    error = kind(
        " 100 % größer\n→ zu groß ",
        reason="MODEL_NOT_FOUND",
        metadata={"model": "gpt-9", "models": "ä,b"},
        retry_after_seconds=1.5,
        field_violations=[("a.b", "is wrong"), ("c", "too")],
        resource="models/gpt-9",
    )
    mesh.inference.generate = _failing(error, *texts)
    call = _generate(mesh)
    for text in texts:
        assert (await call.read()).delta.text == text
    with pytest.raises(kind) as raised, headrace_errors():
        await call.read()
    assert type(raised.value) is kind
    assert vars(raised.value) == vars(error)


@pytest.mark.parametrize("text", ["x", "é", "語", "😀", "%", "\n", " "])
@pytest.mark.parametrize("before", [(), ("a",)])
async def test_an_error_that_is_too_long_is_cut(mesh: ScriptedMesh, text, before) -> None:
    """Headers and trailers stay within the limits of edge and client."""
    error = InvalidArgument(
        text * 100_000,
        reason="INVALID_FIELD",
        metadata={"model": text * 100_000, "models": text * 100_000},
        field_violations=[(text * 1000, text * 1000)] * 100,
        resource=text * 10_000,
    )
    mesh.inference.generate = _failing(error, *before)
    with pytest.raises(InvalidArgument) as raised, headrace_errors():
        await _texts(_generate(mesh))
    assert raised.value.message.startswith(text * 50)
    assert raised.value.field_violations


@pytest.mark.parametrize("texts", [(), ("a",)])
async def test_an_unexpected_exception_is_internal_and_leaks_nothing(
    mesh: ScriptedMesh, texts
) -> None:
    """The caller gets the trace id only."""
    mesh.inference.generate = _failing(RuntimeError("secret"), *texts)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _texts(_generate(mesh))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert reason_of(caught.value) == "INTERNAL"
    assert "secret" not in repr(caught.value)


async def test_a_stream_may_be_empty(mesh: ScriptedMesh) -> None:
    """Its status is in the headers."""

    async def generate(_request: Any, _context: Any) -> AsyncIterator[Any]:
        for message in list[Any]():  # a generator has a yield
            yield message

    mesh.inference.generate = generate
    call = _generate(mesh)
    assert await _texts(call) == []
    assert await call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_a_client_may_compress_its_request(mesh: ScriptedMesh, compression) -> None:
    """The edge forwards it unchanged."""
    models = []

    async def generate(request: Any, _context: Any) -> AsyncIterator[Any]:
        models.append(request.model)
        yield _delta("a")

    mesh.inference.generate = generate
    assert await _texts(_generate(mesh, "x" * 100_000, compression=compression)) == ["a"]
    assert models == ["x" * 100_000]
    assert mesh.inference.metadata["grpc-encoding"] == compression.name.lower()


@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip])
async def test_the_longest_message_passes_and_a_longer_one_is_refused(
    mesh: ScriptedMesh, compression
) -> None:
    """Longer by one byte; the details have the limit, and compression does not help."""
    longest = MAX_REQUEST_BYTES - 5
    assert inference_pb2.GenerateRequest(model="x" * longest).ByteSize() == MAX_REQUEST_BYTES
    assert await _texts(_generate(mesh, "x" * longest, compression=compression))
    with pytest.raises(InvalidArgument) as raised, headrace_errors():
        await _texts(_generate(mesh, "x" * (longest + 1), compression=compression))
    assert raised.value.reason == "MESSAGE_TOO_LARGE"
    assert raised.value.metadata == {"limit_bytes": str(MAX_REQUEST_BYTES)}
    assert mesh.inference.calls == 1


async def test_a_message_of_another_type_is_refused(mesh: ScriptedMesh) -> None:
    """As from a client with other protos."""
    call = mesh.channel.unary_stream(GENERATE_PATH, bytes, bytes)
    with pytest.raises(InvalidArgument) as raised, headrace_errors():
        await call(b"\xff", metadata=mesh.edge.metadata()).read()
    assert raised.value.reason == "INVALID_FIELD"


async def test_the_identity_comes_from_the_token(mesh: ScriptedMesh) -> None:
    """Servicers read it in the same way as over HTTP/2."""

    async def generate(_request: Any, context: Any) -> AsyncIterator[Any]:
        identity = identity_of(context)
        yield _delta(f"{identity.tenant} {identity.user} {sorted(identity.scopes)}")

    mesh.inference.generate = generate
    assert await _texts(_generate(mesh)) == ["acme ann ['billing', 'infer', 'read', 'registry']"]


@pytest.mark.parametrize("started", [False, True])
async def test_the_service_says_that_the_deadline_passed(
    mesh: ScriptedMesh, monkeypatch, started
) -> None:
    """Shortly before the edge and the client would."""
    # A margin that a busy machine keeps, too: the order is the promise here, not the 20 ms.
    monkeypatch.setattr(deadlines, "DEADLINE_MARGIN_SECONDS", 1.5)

    async def wait(_request: Any, context: GrpcCall) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield _delta("a")

    mesh.inference.generate = _forever if started else wait
    with pytest.raises(DeadlineExceeded) as raised, headrace_errors():
        await _texts(_generate(mesh, timeout=2.0))
    assert raised.value.message == "the deadline passed before the work was done"


async def test_a_cancelled_call_is_counted_as_cancelled(mesh: ScriptedMesh) -> None:
    """Under the method's name, as gRPC's own server does."""
    method = GENERATE_PATH.removeprefix("/")
    before = calls_counted("CANCELLED", method)
    cancelled = asyncio.Event()

    async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for message in _forever(request, context):
                yield message
        finally:
            cancelled.set()

    mesh.inference.generate = generate
    call = _generate(mesh)
    await call.read()
    call.cancel()
    async with asyncio.timeout(_PATIENCE_SECONDS):
        await cancelled.wait()
    assert calls_counted("CANCELLED", method) == before + 1


async def test_calls_reuse_a_connection(mesh: ScriptedMesh) -> None:
    """Trailers end a response, not the connection."""
    before = await _connections(mesh)
    for _ in range(20):
        assert await _texts(_generate(mesh)) == ["Hel", "lo", ""]
    assert await _connections(mesh) <= before + 1


async def _connections(mesh: ScriptedMesh) -> int:
    """Returns how many connections the edge has made to the service."""
    query = f"{mesh.edge.admin}/stats?format=json&filter=^cluster.inference_http.upstream_cx_total$"
    async with aiohttp.ClientSession() as http, http.get(query) as response:
        (stat,) = (await response.json())["stats"]
    return int(stat["value"])


async def test_trailers_of_a_request_are_ignored(mesh: ScriptedMesh) -> None:
    """The edge checks headers, but forwards any trailers that a client sends."""
    seen = []

    async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
        seen.append(identity_of(context))
        async for message in two_deltas(request, context):
            yield message

    mesh.inference.generate = generate
    await _texts(_generate(mesh))
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": GENERATE_PATH,
        ":authority": "edge",
        "content-type": "application/grpc",
        "te": "trailers",
        "authorization": dict(mesh.edge.metadata())["authorization"],
    }
    trailers = {"x-headrace-scopes": "registry", "x-headrace-usage-id": "free"}
    encoder = hpack.Encoder()
    host, _, port = mesh.edge.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    end_of_block = frames.END_HEADERS
    writer.write(
        frames.PREFACE
        + frames.settings({})
        + frames.frame(FrameType.HEADERS, end_of_block, 1, encoder.encode(headers.items()))
        + frames.frame(FrameType.DATA, 0, 1, framed(b"\n\x01m"))
        + frames.frame(
            FrameType.HEADERS, end_of_block | frames.END_STREAM, 1, encoder.encode(trailers.items())
        )
    )
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while len(seen) < 2:
            assert await reader.read(65536)
    writer.transport.abort()
    assert seen[1] == seen[0]
