"""Embeddings of texts, in batches that Triton joins with those of other requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from headrace.common.v1 import model_pb2
from headrace.inference.v1 import inference_pb2

from libs.errors import InvalidArgument
from libs.routes import Choice, RouteTable
from services.inference.backends.pool import Backends, Lease
from services.inference.domain import MAX_TEXTS
from services.inference.tensors.codec import encode_varint
from services.inference.tensors.retry import Retrier

# The largest batch that Triton accepts for the model.
BATCH_TEXTS = 64


class Embedder:
    """Embeds texts, in the order given."""

    def __init__(self, *, routes: Callable[[], RouteTable], backends: Backends) -> None:
        self._routes = routes
        self._retrier = Retrier(backends)

    async def embed(
        self, model: str, texts: Sequence[str], *, deadline_seconds: float | None = None
    ) -> inference_pb2.EmbedResponse:
        """Returns one vector per text.

        Raises:
            HeadraceError: see `InferenceService.Embed`.
        """
        if not 1 <= len(texts) <= MAX_TEXTS:
            raise InvalidArgument.of_field("texts", f"must have 1 to {MAX_TEXTS} texts")
        choice = self._routes().choose(model, kind=model_pb2.MODEL_KIND_EMBEDDING)
        try:
            async with asyncio.TaskGroup() as group:
                batches = [
                    group.create_task(
                        self._batch(choice, texts[start : start + BATCH_TEXTS], deadline_seconds)
                    )
                    for start in range(0, len(texts), BATCH_TEXTS)
                ]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # one error is enough for the caller
        target = choice.target
        return inference_pb2.EmbedResponse(
            embeddings=[
                _embedding(values, token_count)
                for batch in batches
                for values, token_count in batch.result()
            ],
            model_version=target.model_version,
            artifact_digest=target.artifact_digest,
            route=inference_pb2.RouteDecision(deployment=target.deployment, reason=choice.reason),
        )

    async def _batch(
        self, choice: Choice, texts: Sequence[str], deadline_seconds: float | None
    ) -> list[tuple[bytes, int]]:
        async def attempt(lease: Lease) -> list[tuple[bytes, int]]:
            return await lease.triton.embed(
                lease.target.model, texts, deadline_seconds=deadline_seconds
            )

        return await self._retrier.run(choice, attempt)


def _embedding(values: bytes, token_count: int) -> inference_pb2.Embedding:
    # Protobuf's packed floats are the same little-endian float32 that Triton sends.
    embedding = inference_pb2.Embedding.FromString(b"\x0a" + encode_varint(len(values)) + values)
    embedding.token_count = token_count
    return embedding
