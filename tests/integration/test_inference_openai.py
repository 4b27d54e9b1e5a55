"""OpenAI's handlers of the inference service, over HTTP, with a generator that a test sets."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from headrace.common.v1 import model_pb2
from headrace.router.v1 import router_internal_pb2 as router_pb2

from libs.clock import SystemClock
from libs.errors import ResourceExhausted, Unavailable
from libs.openai.errors import OpenAIDialect
from libs.routes import RouteTable
from services.inference.api.openai import OpenAIHandlers
from services.inference.domain import ChatCall, Chunk, GenerationResult, Route, TokenUsage
from services.inference.generation.relay import READER_TOO_SLOW
from tests.support.backends import triton_backend
from tests.support.edge import serving_http

pytestmark = pytest.mark.integration

_CHAT = "/v1/chat/completions"
_CALLER = {
    "x-headrace-tenant": "acme",
    "x-headrace-user": "ann",
    "x-headrace-scopes": "infer",
}
_CLOCK = SystemClock()


def _route(model: str) -> router_pb2.ModelRoute:
    target = router_pb2.RouteTarget(
        deployment=f"deployments/{model}",
        model_version=f"models/{model}/versions/1.0.0",
        schema=model_pb2.ModelSchema(kind=model_pb2.MODEL_KIND_CHAT),
        backends=[triton_backend("triton-0", "127.0.0.1:9")],
    )
    return router_pb2.ModelRoute(model=model, targets=[target])


class ScriptedGenerator:
    """Delivers chunks, then fails or ends; keeps the calls."""

    def __init__(self) -> None:
        self.calls: list[ChatCall] = []
        self.chunks = ["Hel", "lo"]
        self.error: Exception | None = None

    async def answer(self, call: ChatCall, _identity: Any, deliver: Any) -> GenerationResult:
        self.calls.append(call)
        for text in self.chunks:
            await deliver(Chunk(text, token_count=1), None)
        if self.error is not None:
            raise self.error
        return GenerationResult(
            request_id=call.request_id,
            trace_id="",
            route=Route(
                deployment="deployments/a",
                reason="",
                epoch="e",
                revision=1,
                model_version="models/a/versions/1.0.0",
                artifact_digest="",
            ),
            finish_reason="stop",
            usage=TokenUsage(0, 0, 0),
            cost_nano_usd=0,
            first_token_seconds=0.0,
            resumed_count=0,
            recomputed_tokens=0,
        )


class Service:
    """The handlers behind a server, and a client of it."""

    def __init__(self) -> None:
        self.generator = ScriptedGenerator()
        self.routes = RouteTable(epoch="e", revision=1, routes=[_route("a"), _route("b")])
        self.http: aiohttp.ClientSession

    async def chat(self, *, stream: bool, **headers: str) -> tuple[int, bytes]:
        body = {"model": "a", "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        async with self.http.post(_CHAT, json=body, headers=_CALLER | named) as response:
            return response.status, await response.read()


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    service = Service()
    handlers = OpenAIHandlers(
        generator=service.generator,  # type: ignore[arg-type]  # has what they use
        routes=lambda: service.routes,
        clock=_CLOCK,
    )
    async with (
        serving_http(handlers.routes(), dialect=OpenAIDialect()) as address,
        aiohttp.ClientSession(f"http://{address}") as service.http,
    ):
        yield service


@pytest.mark.parametrize(
    ("stream", "headers", "seconds"),
    [
        (False, {}, 600),
        (False, {"grpc_timeout": "30S"}, 30),
        (False, {"x_stainless_read_timeout": "20"}, 20),
        (True, {"grpc_timeout": "30S"}, 30),
        (True, {"x_stainless_read_timeout": "20"}, 600),
    ],
)
async def test_a_chat_completion_has_a_deadline(service, stream, headers, seconds):
    """Admission sees it. A client library limits a stream only until it starts."""
    before = _CLOCK.monotonic_seconds()
    status, _ = await service.chat(stream=stream, **headers)
    (call,) = service.generator.calls
    assert status == 200
    assert call.deadline_seconds is not None
    assert call.deadline_seconds - before == pytest.approx(seconds, abs=5)


async def test_a_streamed_answer_is_events(service):
    """Role and text, the end, and `[DONE]`."""
    status, body = await service.chat(stream=True)
    events = body.decode().split("\n\n")
    assert (status, events[-2:]) == (200, ["data: [DONE]", ""])
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == "Hello"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_chunk_is_an_http_error(service, stream):
    """With its retry delay."""
    service.generator.chunks = []
    service.generator.error = Unavailable("down", reason="BACKEND_FAILED", retry_after_seconds=1.5)
    status, body = await service.chat(stream=stream)
    assert (status, json.loads(body)["error"]["code"]) == (503, "backend_failed")


async def test_an_error_after_the_first_chunk_is_the_last_event(service):
    """And `[DONE]` does not follow."""
    service.generator.error = Unavailable("down", reason="BACKEND_FAILED")
    _, body = await service.chat(stream=True)
    *_, last, end = body.split(b"\n\n")
    assert end == b""
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "backend_failed"


async def test_a_reader_that_is_too_slow_is_disconnected(service):
    """It would not read an error event either."""
    service.generator.error = ResourceExhausted("slow", reason=READER_TOO_SLOW)
    with pytest.raises(aiohttp.ClientError):
        await service.chat(stream=True)


async def test_models_are_listed_and_found(service):
    """By every spelling of a name."""
    async with service.http.get("/v1/models", headers=_CALLER) as response:
        listed = await response.json()
    assert [model["id"] for model in listed["data"]] == ["a", "b"]
    for path, status in (
        ("a", 200),
        ("a@1.0.0", 200),
        ("a%401.0.0", 200),
        ("models/a/versions/1.0.0", 200),
        ("c", 404),
        ("", 404),
    ):
        async with service.http.get(f"/v1/models/{path}", headers=_CALLER) as response:
            body = await response.json()
            assert response.status == status
            assert ("error" in body) == (status == 404)
