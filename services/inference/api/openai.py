"""OpenAI's chat completions and model list, over the same generation as gRPC's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from google.api import httpbody_pb2
from google.protobuf import empty_pb2
from headrace.openai.v1 import openai_pb2, openai_pb2_grpc

from libs.chat.request import GenerationRequest, Message
from libs.clock import Clock
from libs.errors import HeadraceError, ResourceExhausted
from libs.ids import uuid7
from libs.openai.bodies import (
    EVENT_STREAM_TYPE,
    JSON_TYPE,
    Served,
    httpbody,
    json_body,
    list_object,
    model_object,
    to_json,
)
from libs.openai.chat_request import ChatRequest, parse_chat_completion
from libs.openai.chat_response import DONE, ChunkWriter, completion_object, error_event
from libs.routes import RouteTable
from libs.rpc.http_call import Handler, HttpCall
from libs.rpc.identity import Context, Identity, identity_of
from services.inference.domain import ChatCall, Chunk, GenerationResult
from services.inference.generation.generator import Generator
from services.inference.generation.relay import READER_TOO_SLOW

Events = Callable[[bytes], Awaitable[None]]


class ChatCompletions:
    """Answers conversations in OpenAI's JSON, whoever carries it."""

    def __init__(self, *, generator: Generator, clock: Clock) -> None:
        self._generator = generator
        self._clock = clock

    async def answer(self, body: bytes, identity: Identity, write_events: Events) -> bytes | None:
        """Returns a whole answer; a streamed one is written as events, and None is returned.

        Raises:
            HeadraceError: see `ChatCompletionService.CreateChatCompletion`. Once there was an
                event, the last one has told of it.
        """
        asked = parse_chat_completion(body)
        call = _chat_call(asked, uuid7(self._clock))
        if not asked.stream:
            return await self._whole(asked, call, identity)
        await self._stream(asked, call, identity, write_events)
        return None

    async def _whole(self, asked: ChatRequest, call: ChatCall, identity: Identity) -> bytes:
        texts: list[str] = []

        async def collect(chunk: Chunk) -> None:
            texts.append(chunk.text)

        result = await self._generator.answer(call, identity, collect)
        completion = completion_object(
            model=asked.model,
            created_seconds=int(self._clock.now().timestamp()),
            content="".join(texts),
            finish_reason=result.finish_reason,
            usage=result.usage,
            served=_served(result),
        )
        return to_json(completion)

    async def _stream(
        self, asked: ChatRequest, call: ChatCall, identity: Identity, write: Events
    ) -> None:
        chunks = ChunkWriter(
            model=asked.model,
            created_seconds=int(self._clock.now().timestamp()),
            request_id=call.request_id,
            include_usage=asked.include_usage,
        )
        prefix = chunks.role()

        async def deliver(chunk: Chunk) -> None:
            nonlocal prefix
            if not chunk.text:
                return
            events, prefix = prefix + chunks.delta(chunk.text), b""
            await write(events)

        try:
            result = await self._generator.answer(call, identity, deliver)
        except HeadraceError as error:
            # The status line is gone: the error must be an event, for one that reads.
            if not prefix and error.reason != READER_TOO_SLOW:
                await write(error_event(error))
            raise
        usage = chunks.usage(result.usage) if asked.include_usage else b""
        ending = chunks.finish(result.finish_reason, _served(result))
        await write(prefix + ending + usage + DONE)


class ChatCompletionServicer(openai_pb2_grpc.ChatCompletionServiceServicer):
    """The same over gRPC."""

    def __init__(self, completions: ChatCompletions) -> None:
        self._completions = completions

    async def CreateChatCompletion(  # type: ignore[override]  # writes instead of yielding
        self, request: httpbody_pb2.HttpBody, context: Context
    ) -> None:
        """Answers one conversation."""

        async def write(events: bytes) -> None:
            await context.write(httpbody(events, EVENT_STREAM_TYPE))

        whole = await self._completions.answer(request.data, identity_of(context), write)
        if whole is not None:
            await context.write(httpbody(whole, JSON_TYPE))


def chat_completions_over_http(completions: ChatCompletions) -> Handler:
    """Returns the handler of `POST /v1/chat/completions`."""

    async def handle(call: HttpCall) -> None:
        async def write(events: bytes) -> None:
            await call.send_chunk(events, content_type=EVENT_STREAM_TYPE)

        try:
            whole = await completions.answer(call.body, call.identity, write)
        except ResourceExhausted as error:
            if error.reason == READER_TOO_SLOW:
                call.abort()
            raise
        if whole is not None:
            call.respond(whole, content_type=JSON_TYPE)

    return handle


class ModelServicer(openai_pb2_grpc.ModelServiceServicer):
    """`GET /v1/models`."""

    def __init__(self, routes: Callable[[], RouteTable]) -> None:
        self._routes = routes

    async def ListModels(
        self, _request: empty_pb2.Empty, _context: Context
    ) -> httpbody_pb2.HttpBody:
        """Lists the deployed models."""
        models = self._routes().models()
        return json_body(list_object(model_object(model) for model in models))

    async def GetModel(
        self, request: openai_pb2.GetModelRequest, _context: Context
    ) -> httpbody_pb2.HttpBody:
        """Gets one deployed model."""
        self._routes().choose(request.model, kind=None)
        return json_body(model_object(request.model))


def _chat_call(asked: ChatRequest, request_id: str) -> ChatCall:
    return ChatCall(
        request_id=request_id,
        request=GenerationRequest(
            model=asked.model,
            messages=tuple(Message(role, content) for role, content in asked.messages),
            max_tokens=asked.max_tokens,
            temperature=asked.temperature or 0.0,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=asked.seed,
            stop=asked.stop,
        ),
        streamed=asked.stream,
    )


def _served(result: GenerationResult) -> Served:
    return Served(
        model_version=result.route.model_version,
        artifact_digest=result.route.artifact_digest,
        deployment=result.route.deployment,
        route_reason=result.route.reason,
        cost_nano_usd=result.cost_nano_usd,
        request_id=result.request_id,
        trace_id=result.trace_id,
    )
