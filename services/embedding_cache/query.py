"""What is asked and what is answered, whatever the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.common.v1 import usage_pb2

from libs.routes import Choice
from libs.rpc.identity import Identity
from services.embedding_cache.domain import Lookup


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is asked.

    Attributes:
        request_id: as the client gave it, or empty.
        texts_field: the field of the request that holds the texts, for errors.
        dimensions: the length that the vectors must have, or None.
    """

    model: str
    texts: Sequence[str]
    identity: Identity
    request_id: str = ""
    texts_field: str = "texts"
    dimensions: int | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is answered. Its usage is recorded."""

    lookup: Lookup
    choice: Choice
    usage: usage_pb2.TokenUsage
    cost_nano_usd: int
    request_id: str
    trace_id: str
