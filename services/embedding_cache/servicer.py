"""`headrace.embedding.v1.EmbeddingService`."""

from __future__ import annotations

from headrace.embedding.v1 import embedding_pb2, embedding_pb2_grpc
from typing_extensions import override

from libs.rpc.identity import Context, identity_of
from services.embedding_cache.embedder import Embedder
from services.embedding_cache.query import Query
from services.embedding_cache.wire import to_response


class EmbeddingServicer(embedding_pb2_grpc.EmbeddingServiceServicer):
    """Serves vectors over gRPC."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    @override
    async def Embed(
        self, request: embedding_pb2.EmbedRequest, context: Context
    ) -> embedding_pb2.EmbedResponse:
        """Turns texts into vectors."""
        query = Query(
            model=request.model,
            texts=request.texts,
            identity=identity_of(context),
            request_id=request.request_id,
        )
        return to_response(await self._embedder.embed(query))
