"""OpenAI's chat completions and models over HTTP; the generation is the same as gRPC's."""

from __future__ import annotations

from collections.abc import Callable

from libs.chat.request import GenerationRequest, Message
from libs.clock import Clock
from libs.errors import ResourceExhausted
from libs.ids import uuid7
from libs.openai.bodies import (
    CHAT_COMPLETIONS_PATH,
    EVENT_STREAM_TYPE,
    MODELS_PATH,
    Served,
    list_object,
    model_object,
    to_json,
)
from libs.openai.chat_request import ChatRequest, parse_chat_completion
from libs.openai.chat_response import DONE, ChunkWriter, completion_object
from libs.routes import RouteTable
from libs.rpc.access import INFER
from libs.rpc.http_api import HttpRoute
from libs.rpc.http_call import HttpCall
from services.inference.domain import ChatCall, Chunk, GenerationResult, Started
from services.inference.generation.generator import Generator
from services.inference.generation.relay import READER_TOO_SLOW


class OpenAIHandlers:
    """Answers the part of OpenAI's API that this service has."""

    def __init__(
        self, *, generator: Generator, routes: Callable[[], RouteTable], clock: Clock
    ) -> None:
        self._generator = generator
        self._routes = routes
        self._clock = clock

    def routes(self) -> list[HttpRoute]:
        """Returns the routes of the HTTP server."""
        return [
            HttpRoute("POST", CHAT_COMPLETIONS_PATH, self.create_chat_completion, scope=INFER),
            HttpRoute("GET", MODELS_PATH, self.list_models, scope=INFER),
            HttpRoute("GET", f"{MODELS_PATH}/{{model}}", self.get_model, scope=INFER),
        ]

    async def create_chat_completion(self, call: HttpCall) -> None:
        """Answers a conversation with one JSON object, or with events if `stream` is true.

        A stream that breaks off ends with an error event and without `[DONE]`.

        Raises:
            HeadraceError: see `InferenceService.Generate`.
        """
        asked = parse_chat_completion(call.body)
        # A client's timeout ends when a stream starts; a complete response starts when it is done.
        deadline_seconds = call.deadline_seconds if asked.stream else call.start_deadline_seconds
        chat = _chat_call(asked, uuid7(self._clock), deadline_seconds)
        if asked.stream:
            await self._stream(asked, chat, call)
        else:
            await self._complete(asked, chat, call)

    async def list_models(self, call: HttpCall) -> None:
        """Lists the deployed models."""
        models = self._routes().models()
        call.respond(to_json(list_object(model_object(model) for model in models)))

    async def get_model(self, call: HttpCall) -> None:
        """Gets a deployed model.

        Raises:
            NotFound: there is none of this name.
        """
        self._routes().choose(call.parameter, kind=None)
        call.respond(to_json(model_object(call.parameter)))

    async def _complete(self, asked: ChatRequest, chat: ChatCall, call: HttpCall) -> None:
        texts: list[str] = []

        async def collect(chunk: Chunk, _started: Started | None) -> None:
            texts.append(chunk.text)

        result = await self._generator.answer(chat, call.identity, collect)
        completion = completion_object(
            model=asked.model,
            created_seconds=int(self._clock.now().timestamp()),
            content="".join(texts),
            finish_reason=result.finish_reason,
            usage=result.usage,
            served=_served(result),
        )
        call.respond(to_json(completion))

    async def _stream(self, asked: ChatRequest, chat: ChatCall, call: HttpCall) -> None:
        chunks = ChunkWriter(
            model=asked.model,
            created_seconds=int(self._clock.now().timestamp()),
            request_id=chat.request_id,
            include_usage=asked.include_usage,
        )
        prefix = chunks.role()

        async def deliver(chunk: Chunk, _started: Started | None) -> None:
            nonlocal prefix
            if not chunk.text:
                return
            events, prefix = prefix + chunks.delta(chunk.text), b""
            await call.send_chunk(events, content_type=EVENT_STREAM_TYPE)

        try:
            result = await self._generator.answer(chat, call.identity, deliver)
        except ResourceExhausted as error:
            if error.reason == READER_TOO_SLOW:
                call.abort()  # an error event would not be read either
            raise
        usage = chunks.usage(result.usage) if asked.include_usage else b""
        last = prefix + chunks.finish(result.finish_reason, _served(result)) + usage + DONE
        await call.send_chunk(last, content_type=EVENT_STREAM_TYPE)


def _chat_call(asked: ChatRequest, request_id: str, deadline_seconds: float) -> ChatCall:
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
        deadline_seconds=deadline_seconds,
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
