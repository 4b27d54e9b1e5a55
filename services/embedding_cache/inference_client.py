"""Calls `inference` for vectors that are not in the cache."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.inference.v1 import inference_internal_pb2, inference_internal_pb2_grpc

from libs.errors import Unavailable
from libs.model_reference import at_version, version_of
from libs.routes import Choice
from libs.rpc.identity import Identity
from libs.rpc.status import headrace_errors
from services.embedding_cache.domain import RETRY_SECONDS, Vector, backend_failed
from services.embedding_cache.wire import from_embedding


class InferenceClient:
    """Computes vectors with exactly one version of a model."""

    def __init__(
        self,
        inference: inference_internal_pb2_grpc.InferenceInternalServiceAsyncStub,
        *,
        timeout_seconds: float,
    ) -> None:
        self._inference = inference
        self._timeout_seconds = timeout_seconds

    async def embed(
        self, texts: Sequence[str], *, choice: Choice, identity: Identity
    ) -> list[Vector]:
        """Returns one vector for each text, in their order.

        Raises:
            Unavailable: `inference` serves another artifact under this version than the route
                says (one of the two has an older snapshot), or a backend returned invalid vectors.
            HeadraceError: the error of `inference`.
        """
        target = choice.target
        model = at_version(choice.model, version_of(target.model_version))
        request = inference_internal_pb2.EmbedRequest(model=model, texts=texts)
        with headrace_errors():
            response = await self._inference.Embed(
                request, metadata=identity.internal().metadata(), timeout=self._timeout_seconds
            )
        if response.artifact_digest != target.artifact_digest:
            raise Unavailable(
                f"{target.model_version} is being replaced: inference served "
                f"{response.artifact_digest}, the route says {target.artifact_digest}; retry later",
                reason="MODEL_NOT_READY",
                metadata={"model": choice.model},
                retry_after_seconds=RETRY_SECONDS,
            )
        if len(response.embeddings) != len(texts):
            raise backend_failed(
                f"a backend returned {len(response.embeddings)} vectors for {len(texts)} texts"
            )
        dimensions = target.schema.dimensions
        return [from_embedding(item, dimensions=dimensions) for item in response.embeddings]
