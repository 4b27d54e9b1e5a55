"""OpenAI's chat completions and model list, over the same generation as gRPC's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from google.api import httpbody_pb2
from google.protobuf import empty_pb2
from headrace.inference.v1 import inference_pb2
from headrace.openai.v1 import openai_pb2, openai_pb2_grpc

from libs.clock import Clock
from libs.errors import HeadraceError
from libs.ids import uuid7
from libs.openai.bodies import Served, events_body, json_body, list_object, model_object
from libs.openai.chat_request import ChatRequest, parse_chat_completion
from libs.openai.chat_response import DONE, ChunkWriter, completion_object, error_event
from libs.rpc.identity import Context, Identity, identity_of
from services.inference.domain import ChatCall, Piece, Turn
from services.inference.generation import Generator

Write = Callable[[httpbody_pb2.HttpBody], Awaitable[None]]


class ChatCompletionServicer(openai_pb2_grpc.ChatCompletionServiceServicer):
    """`POST /v1/chat/completions`, streamed or not."""

    def __init__(self, *, generator: Generator, clock: Clock) -> None:
        self._generator = generator
        self._clock = clock

    async def CreateChatCompletion(  # type: ignore[override]  # writes instead of yielding
        self, request: httpbody_pb2.HttpBody, context: Context
    ) -> None:
        """Answers one conversation."""
        asked = parse_chat_completion(request.data)
        call = _chat_call(asked, uuid7(self._clock))
        answer = self._stream if asked.stream else self._whole
        await answer(asked, call, identity_of(context), context.write)

    async def _whole(
        self, asked: ChatRequest, call: ChatCall, identity: Identity, write: Write
    ) -> None:
        texts: list[str] = []

        async def collect(piece: Piece) -> None:
            texts.append(piece.text)

        final = await self._generator.answer(call, identity, collect)
        completion = completion_object(
            model=asked.model,
            created_seconds=int(self._clock.now().timestamp()),
            content="".join(texts),
            finish_reason=final.finish_reason,
            usage=final.usage,
            served=_served(final),
        )
        await write(json_body(completion))

    async def _stream(
        self, asked: ChatRequest, call: ChatCall, identity: Identity, write: Write
    ) -> None:
        chunks = ChunkWriter(
            model=asked.model,
            created_seconds=int(self._clock.now().timestamp()),
            request_id=call.request_id,
            include_usage=asked.include_usage,
        )
        prefix = chunks.role()

        async def deliver(piece: Piece) -> None:
            nonlocal prefix
            events, prefix = prefix + chunks.delta(piece.text), b""
            await write(events_body(events))

        try:
            final = await self._generator.answer(call, identity, deliver)
        except HeadraceError as error:
            if not prefix:  # the status line is gone: the error must be an event
                await write(events_body(error_event(error)))
            raise
        usage = chunks.usage(final.usage) if asked.include_usage else b""
        ending = chunks.finish(final.finish_reason, _served(final))
        await write(events_body(prefix + ending + usage + DONE))


class ModelServicer(openai_pb2_grpc.ModelServiceServicer):
    """`GET /v1/models`."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def ListModels(
        self, _request: empty_pb2.Empty, _context: Context
    ) -> httpbody_pb2.HttpBody:
        """Lists the deployed models."""
        models = self._generator.routes.models()
        return json_body(list_object(model_object(model) for model in models))

    async def GetModel(
        self, request: openai_pb2.GetModelRequest, _context: Context
    ) -> httpbody_pb2.HttpBody:
        """Gets one deployed model."""
        self._generator.routes.choose(request.model, kind=None)
        return json_body(model_object(request.model))


def _chat_call(asked: ChatRequest, request_id: str) -> ChatCall:
    return ChatCall(
        request_id=request_id,
        model=asked.model,
        turns=tuple(Turn(role, content) for role, content in asked.messages),
        max_tokens=asked.max_tokens,
        temperature=asked.temperature or 0.0,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=asked.seed,
        stop=asked.stop,
        streamed=asked.stream,
    )


def _served(final: inference_pb2.Final) -> Served:
    return Served(
        model_version=final.model_version,
        artifact_digest=final.artifact_digest,
        deployment=final.route.deployment,
        route_reason=final.route.reason,
        cost_nano_usd=final.cost_nano_usd,
        request_id=final.request_id,
        trace_id=final.trace_id,
    )
