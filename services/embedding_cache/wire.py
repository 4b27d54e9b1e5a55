"""Converts vectors and answers from and to protos."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable

from headrace.common.v1 import embedding_pb2 as common_embedding_pb2
from headrace.embedding.v1 import embedding_pb2

from services.embedding_cache.domain import Vector, backend_failed
from services.embedding_cache.query import Answer


def from_embedding(embedding: common_embedding_pb2.Embedding, *, dimensions: int) -> Vector:
    """Returns a vector in the form in which it is cached.

    Raises:
        Unavailable: the vector has the wrong length, or a value that is not finite. It is refused
            because it would stay in the cache.
    """
    values = embedding.values
    if len(values) != dimensions or not math.isfinite(sum(values)):
        raise backend_failed(
            f"a backend returned an invalid vector: expected {dimensions} finite numbers"
        )
    return Vector(embedding.SerializeToString(), embedding.token_count)


def values_of(vector: Vector) -> tuple[float, ...]:
    """Returns the numbers of a vector."""
    return tuple(common_embedding_pb2.Embedding.FromString(vector.encoded).values)


def float32_bytes(values: Iterable[float]) -> bytes:
    """Returns numbers as float32, little-endian."""
    numbers = tuple(values)
    return struct.pack(f"<{len(numbers)}f", *numbers)


def to_response(answer: Answer) -> embedding_pb2.EmbedResponse:
    """Returns the response of `EmbeddingService.Embed`."""
    target = answer.choice.target
    response = embedding_pb2.EmbedResponse(
        hit_count=answer.lookup.hit_count,
        usage=answer.usage,
        cost_nano_usd=answer.cost_nano_usd,
        model_version=target.model_version,
        artifact_digest=target.artifact_digest,
        route=answer.choice.decision(),
        request_id=answer.request_id,
        trace_id=answer.trace_id,
    )
    for vector in answer.lookup.vectors:
        response.embeddings.add().MergeFromString(vector.encoded)
    return response
