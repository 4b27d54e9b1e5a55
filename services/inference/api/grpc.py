"""`InferenceService` and `InferenceInternalService`: translate, nothing else."""

from __future__ import annotations

from headrace.inference.v1 import (
    inference_internal_pb2,
    inference_internal_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)

from libs.chat import wire
from libs.chat.request import MAX_PRIORITY
from libs.clock import Clock
from libs.rpc.grpc_http1 import GrpcCall
from libs.rpc.identity import Context, identity_of
from services.inference.api import convert
from services.inference.domain import Chunk, Started
from services.inference.generation.generator import Generator
from services.inference.tensors.count_tokens import TokenCounter
from services.inference.tensors.embed import Embedder

GENERATE_PATH = "/headrace.inference.v1.InferenceService/Generate"


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """The gRPC side of generation and token counts."""

    def __init__(self, *, generator: Generator, counter: TokenCounter, clock: Clock) -> None:
        self._generator = generator
        self._counter = counter
        self._clock = clock

    async def Generate(  # type: ignore[override]  # writes instead of yielding
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> None:
        """Streams one answer."""
        deadline_seconds = convert.deadline_seconds(context, self._clock)
        call = convert.chat_call(request, self._clock, deadline_seconds=deadline_seconds)
        caller = identity_of(context)
        # One that no token allows is an invalid field: the generator says so.
        caller.allow_priority(min(request.priority, MAX_PRIORITY))
        writer: convert.DeltaWriter | None = None

        async def deliver(chunk: Chunk, started: Started | None) -> None:
            nonlocal writer
            if writer is not None:
                await context.write(writer.delta(chunk))
            elif started is not None:
                writer = convert.DeltaWriter(call.request, started)
                events = [convert.started_event(started)]
                if chunk.text or chunk.token_count:
                    events.append(writer.delta(chunk))
                await _write_together(context, events)

        result = await self._generator.answer(call, caller, deliver)
        await context.write(convert.final_event(result))

    async def CountTokens(
        self, request: inference_pb2.CountTokensRequest, context: Context
    ) -> inference_pb2.CountTokensResponse:
        """Returns the tokens of a prompt."""
        count = await self._counter.count(
            wire.count_request(request),
            identity_of(context),
            deadline_seconds=convert.deadline_seconds(context, self._clock),
        )
        return convert.count_response(count)


class InferenceInternalServicer(inference_internal_pb2_grpc.InferenceInternalServiceServicer):
    """What other services of the mesh ask for."""

    def __init__(self, embedder: Embedder, clock: Clock) -> None:
        self._embedder = embedder
        self._clock = clock

    async def Embed(
        self, request: inference_internal_pb2.EmbedRequest, context: Context
    ) -> inference_internal_pb2.EmbedResponse:
        """Returns vectors. They are neither cached nor billed: `embedding_cache` does both."""
        embeddings = await self._embedder.embed(
            request.model,
            request.texts,
            identity_of(context),
            deadline_seconds=convert.deadline_seconds(context, self._clock),
        )
        return convert.embed_response(embeddings)


async def _write_together(context: Context, events: list[inference_pb2.GenerateResponse]) -> None:
    """Writes events together where the transport can: the first token then costs no extra write."""
    over_http1: object = context  # a `GrpcCall` has what servicers use of a `Context`
    if isinstance(over_http1, GrpcCall):
        await over_http1.write_together(events)
        return
    for event in events:
        await context.write(event)
