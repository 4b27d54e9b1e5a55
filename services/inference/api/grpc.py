"""`InferenceService`: translates, nothing else."""

from __future__ import annotations

from headrace.inference.v1 import inference_pb2, inference_pb2_grpc

from libs.clock import Clock
from libs.rpc.identity import Context, identity_of
from services.inference.api import convert
from services.inference.domain import Chunk
from services.inference.generation.generator import Generator
from services.inference.tensors.count_tokens import TokenCounter
from services.inference.tensors.embed import Embedder

GENERATE_PATH = "/headrace.inference.v1.InferenceService/Generate"


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """The gRPC side of generation, token counts and embeddings."""

    def __init__(
        self, *, generator: Generator, embedder: Embedder, counter: TokenCounter, clock: Clock
    ) -> None:
        self._generator = generator
        self._embedder = embedder
        self._counter = counter
        self._clock = clock

    async def Generate(  # type: ignore[override]  # writes instead of yielding
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> None:
        """Streams one answer."""
        deadline_seconds = convert.deadline_seconds(context, self._clock)
        call = convert.chat_call(request, self._clock, deadline_seconds=deadline_seconds)

        async def deliver(chunk: Chunk) -> None:
            await context.write(convert.delta(chunk))

        result = await self._generator.answer(call, identity_of(context), deliver)
        await context.write(convert.final(result))

    async def Embed(
        self, request: inference_pb2.EmbedRequest, context: Context
    ) -> inference_pb2.EmbedResponse:
        """Returns vectors. They are neither cached nor billed: `embedding_cache` does both."""
        embeddings = await self._embedder.embed(
            request.model,
            request.texts,
            deadline_seconds=convert.deadline_seconds(context, self._clock),
        )
        return convert.embed_response(embeddings)

    async def CountTokens(
        self, request: inference_pb2.CountTokensRequest, context: Context
    ) -> inference_pb2.CountTokensResponse:
        """Returns the tokens of a prompt."""
        count = await self._counter.count(
            convert.count_request(request),
            deadline_seconds=convert.deadline_seconds(context, self._clock),
        )
        return convert.count_response(count)
