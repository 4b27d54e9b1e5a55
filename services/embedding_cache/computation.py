"""Vectors that nobody has yet: `inference` computes them."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.inference.v1 import inference_internal_pb2, inference_internal_pb2_grpc

from libs.errors import Unavailable
from libs.model_reference import at_version, version_of
from libs.routes import Choice
from libs.rpc.identity import Identity
from libs.rpc.status import headrace_errors
from services.embedding_cache.domain import Vector
from services.embedding_cache.wire import RETRY_SECONDS, from_embedding


class Computation:
    """Asks `inference` for the vectors of one batch, of exactly one version."""

    def __init__(
        self,
        inference: inference_internal_pb2_grpc.InferenceInternalServiceAsyncStub,
        *,
        timeout_seconds: float,
    ) -> None:
        self._inference = inference
        self._timeout_seconds = timeout_seconds

    async def compute(
        self, texts: Sequence[str], *, choice: Choice, identity: Identity
    ) -> list[Vector]:
        """Returns one vector a text.

        Raises:
            Unavailable: `inference` serves another artifact under this version than the route
                says (one of the two has not heard the news yet), or a backend gave nonsense.
            HeadraceError: what `inference` said.
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
                f"{target.model_version} is changing: served {response.artifact_digest}, "
                f"routed {target.artifact_digest}",
                reason="MODEL_NOT_READY",
                metadata={"model": choice.model},
                retry_after_seconds=RETRY_SECONDS,
            )
        if len(response.embeddings) != len(texts):
            raise Unavailable(
                f"a backend gave {len(response.embeddings)} vectors for {len(texts)} texts",
                reason="BACKEND_FAILED",
                retry_after_seconds=RETRY_SECONDS,
            )
        dimensions = target.schema.dimensions
        return [from_embedding(item, dimensions=dimensions) for item in response.embeddings]
