"""Vectors from an embedding model, in batches that Triton joins with those of others."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from headrace.common.v1 import model_pb2
from headrace.inference.v1 import inference_pb2

from libs.errors import InvalidArgument, Unavailable
from libs.routes import EMPTY, Choice, RouteTable
from services.inference.backends.pool import Backends
from services.inference.domain import MAX_TEXTS, BackendFailedError
from services.inference.tensors.codec import encode_varint

# Triton takes no larger batch of the model than this.
BATCH_TEXTS = 64
MAX_ATTEMPTS = 3


class Embedder:
    """Embeds texts, in the order given."""

    def __init__(self, *, backends: Backends) -> None:
        self._backends = backends
        self.routes: RouteTable = EMPTY

    async def embed(self, model: str, texts: Sequence[str]) -> inference_pb2.EmbedResponse:
        """Returns one vector a text.

        Raises:
            HeadraceError: see `InferenceService.Embed`.
        """
        if not 1 <= len(texts) <= MAX_TEXTS:
            raise InvalidArgument.of_field("texts", f"must have 1 to {MAX_TEXTS} texts")
        choice = self.routes.choose(model, kind=model_pb2.MODEL_KIND_EMBEDDING)
        try:
            async with asyncio.TaskGroup() as group:
                batches = [
                    group.create_task(self._batch(choice, texts[start : start + BATCH_TEXTS]))
                    for start in range(0, len(texts), BATCH_TEXTS)
                ]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # one reason is enough, and has a status
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

    async def _batch(self, choice: Choice, texts: Sequence[str]) -> list[tuple[bytes, int]]:
        failed: frozenset[str] = frozenset()
        for _ in range(MAX_ATTEMPTS):
            try:
                with self._backends.lease(choice.target.backends, avoid=failed) as lease:
                    return await lease.triton.embed(lease.backend.backend_model, texts)
            except BackendFailedError as error:
                failed |= error.backends
        raise Unavailable(
            f"the backends of {choice.target.model_version} failed",
            reason="BACKEND_FAILED",
            metadata={"backend": ",".join(sorted(failed))},
            retry_after_seconds=1.0,
        )


def _embedding(values: bytes, token_count: int) -> inference_pb2.Embedding:
    # Protobuf's packed floats are the same little-endian float32 Triton sent: nothing to decode.
    embedding = inference_pb2.Embedding.FromString(b"\x0a" + encode_varint(len(values)) + values)
    embedding.token_count = token_count
    return embedding
