"""Requests and answers, independent of the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.common.v1 import usage_pb2

from libs.routes import Choice
from libs.rpc.identity import Identity
from services.embedding_cache.domain import Lookup


@dataclass(frozen=True, kw_only=True)
class Query:
    """A request for vectors.

    Attributes:
        request_id: the client's ID, or empty.
        texts_field: name of the request's field with the texts, for error messages.
        dimensions: the length that the client expects of the vectors, or None.
    """

    model: str
    texts: Sequence[str]
    identity: Identity
    request_id: str = ""
    texts_field: str = "texts"
    dimensions: int | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer whose usage is recorded."""

    lookup: Lookup
    choice: Choice
    usage: usage_pb2.TokenUsage
    cost_nano_usd: int
    request_id: str
    trace_id: str
