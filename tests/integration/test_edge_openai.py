"""OpenAI's paths: bodies pass unchanged, chunk by chunk, and errors have OpenAI's form."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import openai
import pytest
import pytest_asyncio
from yarl import URL

from deploy.envoy.replies import MAX_JSON_BODY_BYTES
from libs.errors import (
    HeadraceError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from tests.support.scripted import BodyPart, ScriptedMesh, one_object, scripted_mesh

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

_CHAT = "/v1/chat/completions"
_PATIENCE_SECONDS = 10.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory) -> AsyncIterator[ScriptedMesh]:
    async with scripted_mesh(tmp_path_factory.mktemp("edge")) as mesh:
        yield mesh


@pytest.fixture
def mesh(running: ScriptedMesh) -> ScriptedMesh:
    running.chat.answer = one_object
    return running


def _event(text: str) -> bytes:
    chunk = {
        "id": "1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": {"content": text}}],
    }
    return f"data: {json.dumps(chunk)}\n\n".encode()


async def _error(
    mesh: ScriptedMesh, path: str | URL = _CHAT, **request: Any
) -> tuple[int, Any, Any]:
    """Returns the status, the error object and the headers of a request that fails."""
    request.setdefault("headers", mesh.edge.bearer())
    async with mesh.http.request(request.pop("method", "POST"), path, **request) as response:
        assert response.content_type == "application/json"
        body = await response.json()
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        return response.status, body["error"], response.headers


def _raising(error: Exception) -> Any:
    async def answer(body: bytes) -> AsyncIterator[BodyPart]:
        if body:  # always; a generator has a yield somewhere
            raise error
        yield BodyPart(b"")

    return answer


async def test_bodies_pass_the_edge_unchanged(mesh: ScriptedMesh) -> None:
    """The request's and the response's."""
    sent = b'{ "model":"m", "messages": [{"content": ["a", 1e3]}] ,"new_field":\xf0\x9f\x98\x80 }'
    headers = mesh.edge.bearer() | {"content-type": "application/json"}
    async with mesh.http.post(_CHAT, data=sent, headers=headers) as response:
        assert response.status == 200
        assert response.content_type == "application/json"
        assert await response.read() == b'{"object":"chat.completion"}'
    assert mesh.chat.body == sent


async def test_events_arrive_one_by_one(mesh: ScriptedMesh) -> None:
    """The edge forwards each event before the next one exists."""
    may_go_on = asyncio.Semaphore(0)

    async def answer(_body: bytes) -> AsyncIterator[BodyPart]:
        for number in range(5):
            yield BodyPart(f"data: {number}\n\n".encode())
            await may_go_on.acquire()
        yield BodyPart(b"data: [DONE]\n\n")

    mesh.chat.answer = answer
    async with (
        asyncio.timeout(_PATIENCE_SECONDS),
        mesh.http.post(_CHAT, json={"stream": True}, headers=mesh.edge.bearer()) as response,
    ):
        assert response.status == 200
        assert response.headers["content-type"] == "text/event-stream"
        for number in range(5):
            # The service waits: what is read now cannot have more than this event.
            assert await response.content.readany() == f"data: {number}\n\n".encode()
            may_go_on.release()
        assert await response.content.read() == b"data: [DONE]\n\n"


async def test_the_unmodified_client_streams(mesh: ScriptedMesh) -> None:
    """The `openai` package needs a base URL and our token as its key."""
    may_go_on = asyncio.Event()

    async def answer(_body: bytes) -> AsyncIterator[BodyPart]:
        yield BodyPart(_event("Hel"))
        await may_go_on.wait()
        yield BodyPart(_event("lo") + b"data: [DONE]\n\n")

    mesh.chat.answer = answer
    text = []
    async with openai.AsyncOpenAI(
        base_url=f"{mesh.edge.url}/v1", api_key=mesh.edge.token(), max_retries=0
    ) as client:
        stream = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        async for chunk in stream:
            text.append(chunk.choices[0].delta.content)
            may_go_on.set()
    assert text == ["Hel", "lo"]


async def test_the_unmodified_client_reads_errors(mesh: ScriptedMesh) -> None:
    """It raises its own class for each status, with our code."""
    mesh.chat.answer = _raising(NotFound("no model m", reason="MODEL_NOT_FOUND"))
    async with openai.AsyncOpenAI(
        base_url=f"{mesh.edge.url}/v1", api_key=mesh.edge.token(), max_retries=0
    ) as client:
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model="m", messages=[])
    assert caught.value.code == "model_not_found"


@dataclass(frozen=True)
class _Failure:
    raised: HeadraceError
    status: int
    type: str
    param: str | None = None
    retry_after: str | None = None


@pytest.mark.parametrize(
    "failure",
    [
        _Failure(
            InvalidArgument.of_fields([("n", "too many"), ("stop", "too long")]),
            status=400,
            type="invalid_request_error",
            param="n",
        ),
        _Failure(
            PermissionDenied("no", reason="SCOPE_MISSING"), status=403, type="permission_error"
        ),
        _Failure(NotFound("no", reason="MODEL_NOT_FOUND"), status=404, type="not_found_error"),
        _Failure(
            ResourceExhausted("full", reason="QUEUE_FULL", retry_after_seconds=2.5),
            status=429,
            type="rate_limit_error",
            retry_after="3",
        ),
        _Failure(
            Unavailable("soon", reason="MODEL_NOT_READY", retry_after_seconds=1),
            status=503,
            type="api_error",
            retry_after="1",
        ),
    ],
    ids=lambda failure: failure.raised.reason,
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_chunk_is_a_plain_http_error(
    mesh: ScriptedMesh, stream: bool, failure: _Failure
) -> None:
    """Status, type, parameter and code say what `google.rpc.Status` says."""
    mesh.chat.answer = _raising(failure.raised)
    status, error, headers = await _error(mesh, json={"stream": stream})
    assert (status, headers.get("retry-after")) == (failure.status, failure.retry_after)
    assert error == {
        "message": failure.raised.message,
        "type": failure.type,
        "param": failure.param,
        "code": failure.raised.reason.lower(),
    }


async def test_any_text_survives_in_an_error(mesh: ScriptedMesh) -> None:
    """Quotes, backslashes, line breaks, JSON and other scripts in messages stay unchanged."""
    message = 'a "quoted\\" back\\slash\n","reason":"EVIL","field":"x" \u00e9\U0001f600 {\\\\"'
    error = NotFound(
        message, reason="MODEL_NOT_FOUND", metadata={"model": '","reason":"EVIL', "message": "no"}
    )
    mesh.chat.answer = _raising(error)
    _, got, _ = await _error(mesh, json={})
    assert (got["message"], got["code"], got["param"]) == (message, "model_not_found", None)


async def test_an_unexpected_exception_is_an_api_error_that_leaks_nothing(
    mesh: ScriptedMesh,
) -> None:
    """A bug in the service is a 500 in OpenAI's form."""
    mesh.chat.answer = _raising(RuntimeError("secret"))
    status, error, _ = await _error(mesh, json={})
    assert (status, error["type"], error["code"]) == (500, "api_error", "internal")
    assert "secret" not in error["message"]


async def test_an_error_chunk_in_mid_stream_reaches_the_client(mesh: ScriptedMesh) -> None:
    """After the first chunk the status is sent: the error is the last event."""

    async def answer(_body: bytes) -> AsyncIterator[BodyPart]:
        yield BodyPart(b"data: 1\n\n")
        raise Unavailable("lost", reason="BACKEND_FAILED")

    mesh.chat.answer = answer
    async with mesh.http.post(_CHAT, json={}, headers=mesh.edge.bearer()) as response:
        assert response.status == 200
        first, last, end = (await response.read()).split(b"\n\n")
    assert (first, end) == (b"data: 1", b"")
    assert json.loads(last.removeprefix(b"data: "))["error"] == {
        "message": "lost",
        "type": "api_error",
        "param": None,
        "code": "backend_failed",
    }


async def test_closing_the_connection_cancels_the_service(mesh: ScriptedMesh) -> None:
    """In mid-stream."""
    cancelled = asyncio.Event()

    async def answer(_body: bytes) -> AsyncIterator[BodyPart]:
        yield BodyPart(b"data: 1\n\n")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    mesh.chat.answer = answer
    async with (
        aiohttp.ClientSession(mesh.edge.url) as http,
        http.post(_CHAT, json={}, headers=mesh.edge.bearer()) as response,
    ):
        assert await response.content.readany() == b"data: 1\n\n"
        response.close()
    async with asyncio.timeout(_PATIENCE_SECONDS):
        await cancelled.wait()


async def test_a_body_that_is_too_long_is_refused(mesh: ScriptedMesh) -> None:
    """One byte over the limit is a 413, with a length or in chunks."""

    async def in_parts() -> AsyncIterator[bytes]:
        for _ in range(MAX_JSON_BODY_BYTES // 4096 + 1):
            yield b"x" * 4096

    for data in (io.BytesIO(bytes(MAX_JSON_BODY_BYTES + 1)), in_parts()):
        status, error, _ = await _error(mesh, data=data)
        assert (status, error["type"]) == (413, "invalid_request_error")
        assert (error["param"], error["code"]) == ("body", "message_too_large")


async def test_a_body_just_below_the_limit_passes(mesh: ScriptedMesh) -> None:
    """No smaller limit applies on the way."""
    data = b"x" * (MAX_JSON_BODY_BYTES - 1024)
    headers = mesh.edge.bearer()
    async with mesh.http.post(_CHAT, data=io.BytesIO(data), headers=headers) as response:
        assert response.status == 200
    assert mesh.chat.body == data


async def test_a_long_response_passes_completely(mesh: ScriptedMesh) -> None:
    """2,048 vectors in JSON are some 20 MB in one message."""
    data = b"[" + b"1," * 10_000_000 + b"1]"

    async def answer(_body: bytes) -> AsyncIterator[BodyPart]:
        yield BodyPart(data, "application/json")

    mesh.chat.answer = answer
    async with mesh.http.post(_CHAT, json={}, headers=mesh.edge.bearer()) as response:
        assert await response.read() == data


@pytest.mark.parametrize(
    ("request_", "status", "kind", "code"),
    [
        ({"headers": {}}, 401, "authentication_error", "token_invalid"),
        ({"headers": {"authorization": "Bearer x"}}, 401, "authentication_error", "token_invalid"),
        ({"path": "/v1/nothing"}, 404, "not_found_error", "method_not_found"),
        ({"method": "GET"}, 404, "not_found_error", "method_not_found"),
        ({"path": "/v1/models/gpt-9", "method": "GET"}, 404, "not_found_error", "model_not_found"),
        ({"path": "/v1/embeddings"}, 503, "api_error", "edge_unavailable"),
    ],
)
async def test_the_edges_own_errors_have_the_same_form(
    mesh: ScriptedMesh, request_: dict[str, Any], status: int, kind: str, code: str
) -> None:
    """Also those of paths and services that do not exist or are down."""
    got, error, headers = await _error(mesh, **{"json": {}, **request_})
    assert (got, error["type"], error["code"]) == (status, kind, code)
    assert error["message"]
    assert ("retry-after" in headers) == (status == 503)


async def test_models_are_listed_and_found(mesh: ScriptedMesh) -> None:
    """Unknown query parameters are ignored."""
    async with mesh.http.get("/v1/models?limit=1", headers=mesh.edge.bearer()) as response:
        assert await response.json() == {"object": "list"}


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("smollm2", "smollm2"),
        ("smollm2@1.0.0", "smollm2@1.0.0"),
        ("smollm2%401.0.0", "smollm2@1.0.0"),
        ("models%2Fsmollm2%2Fversions%2F1.0.0", "models/smollm2/versions/1.0.0"),
        ("models/smollm2/versions/1.0.0", "models/smollm2/versions/1.0.0"),
        ("smollm2@1.0.0?stream=true", "smollm2@1.0.0"),
    ],
)
async def test_a_model_is_found_by_any_spelling_of_its_name(
    mesh: ScriptedMesh, path: str, model: str
) -> None:
    """Names with a version have `@` or slashes, which clients may percent-encode."""
    url = URL(f"{mesh.edge.url}/v1/models/{path}", encoded=True)
    async with aiohttp.ClientSession() as http, http.get(url, headers=mesh.edge.bearer()) as found:
        assert (found.status, await found.json()) == (200, {"id": model})


@pytest.mark.parametrize("path", ["%ff", "a%00b", "%F0%9F%98%80", "", "a" * 5000])
async def test_a_model_that_does_not_exist_is_an_openai_error(
    mesh: ScriptedMesh, path: str
) -> None:
    """Whatever its name is."""
    url = URL(f"/v1/models/{path}", encoded=True)
    status, error, _ = await _error(mesh, url, method="GET")
    assert status == (400 if path == "%ff" else 404)
    assert error["code"] == ("invalid_field" if path == "%ff" else "model_not_found")
