"""Embeddings of texts, in batches that Triton may merge with others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.common.v1 import model_pb2

from libs.embedding_texts import MAX_TEXTS
from libs.errors import InvalidArgument
from libs.routes import Choice, RouteTable
from services.inference.backends.pool import Backends, Lease
from services.inference.domain import Route
from services.inference.routing import route_of
from services.inference.tensors.retry import Retrier

# The largest batch that the model's configuration in Triton allows.
BATCH_TEXTS = 64


@dataclass(frozen=True)
class Embeddings:
    """Vectors in the order of their texts.

    Attributes:
        vectors: of each text its vector, as little-endian float32, and its number of tokens.
        route: which version computed them.
    """

    vectors: Sequence[tuple[bytes, int]]
    route: Route


class Embedder:
    """Computes embeddings."""

    def __init__(self, *, routes: Callable[[], RouteTable], backends: Backends) -> None:
        self._routes = routes
        self._retrier = Retrier(backends)

    async def embed(
        self, model: str, texts: Sequence[str], *, deadline_seconds: float | None = None
    ) -> Embeddings:
        """Returns one vector for each text.

        Args:
            model: a model reference.
            texts: 1 to `MAX_TEXTS`.
            deadline_seconds: when the caller gives up, on the clock's monotonic time.

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
            raise errors.exceptions[0] from None  # the first error is enough, and has a status
        vectors = [vector for batch in batches for vector in batch.result()]
        return Embeddings(vectors, route_of(choice))

    async def _batch(
        self, choice: Choice, texts: Sequence[str], deadline_seconds: float | None
    ) -> list[tuple[bytes, int]]:
        async def attempt(lease: Lease) -> list[tuple[bytes, int]]:
            return await lease.triton.embed(
                lease.target.model, texts, deadline_seconds=deadline_seconds
            )

        return await self._retrier.run(choice, attempt)
