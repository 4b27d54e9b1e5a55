"""OpenAI's `POST /v1/embeddings`."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from dataclasses import dataclass

from libs.openai.bodies import EMBEDDINGS_PATH, Json, Served, to_json
from libs.openai.fields import Fields, parse_fields
from libs.rpc.access import INFER
from libs.rpc.http_api import HttpRoute
from libs.rpc.http_call import HttpCall
from services.embedding_cache.domain import Vector
from services.embedding_cache.embedder import Embedder
from services.embedding_cache.query import Answer, Query
from services.embedding_cache.wire import float32_bytes, values_of

_KNOWN = frozenset({"model", "input", "encoding_format", "dimensions", "user"})
_FORMATS = ("float", "base64")

# Writing one vector as text takes about 0.1 ms; other requests run after each batch.
VECTORS_PER_BATCH = 64


@dataclass(frozen=True)
class EmbeddingRequest:
    """A request for vectors.

    Attributes:
        as_base64: write vectors as base64 of little-endian float32, not as lists of numbers.
    """

    model: str
    texts: tuple[str, ...]
    dimensions: int | None
    as_base64: bool


def parse_embedding_request(body: bytes) -> EmbeddingRequest:
    """Parses a request body.

    Raises:
        InvalidArgument: the body is malformed or has an unsupported value; the error has the path
            of the member.
    """
    fields = parse_fields(body)
    fields.refuse_unknown(_KNOWN)
    encoding = fields.text("encoding_format") or _FORMATS[0]
    if encoding not in _FORMATS:
        fields.refuse("encoding_format", f"must be one of {', '.join(_FORMATS)}")
    return EmbeddingRequest(
        model=fields.require_text("model"),
        texts=_input(fields),
        dimensions=fields.integer("dimensions"),
        as_base64=encoding == "base64",
    )


def _input(fields: Fields) -> tuple[str, ...]:
    value = fields.value("input")
    if isinstance(value, list) and any(isinstance(item, int | list) for item in value):
        fields.refuse("input", "must be text; arrays of tokens are not supported")
    return fields.texts("input")


async def write_embedding_response(answer: Answer, *, model: str, as_base64: bool) -> bytes:
    """Returns the response body; `model` is the model's name as in the request."""
    items: list[str] = []
    vectors = answer.lookup.vectors
    for start in range(0, len(vectors), VECTORS_PER_BATCH):
        if start:
            await asyncio.sleep(0)
        items += (
            f'{{"object":"embedding","index":{index},"embedding":{_vector(vector, as_base64)}}}'
            for index, vector in enumerate(vectors[start : start + VECTORS_PER_BATCH], start=start)
        )
    tail = to_json({"model": model, **_usage_and_origin(answer)})
    return f'{{"object":"list","data":[{",".join(items)}],{tail[1:].decode()}'.encode()


def _vector(vector: Vector, as_base64: bool) -> str:
    values = values_of(vector)
    if as_base64:
        return f'"{base64.b64encode(float32_bytes(values)).decode()}"'
    return f"[{_numbers(values)}]"


def _numbers(values: Sequence[float]) -> str:
    # Nine significant digits restore any float32 exactly, in half the time and size of 17.
    return ",".join(["%.9g"] * len(values)) % tuple(values)


def _usage_and_origin(answer: Answer) -> Json:
    target = answer.choice.target
    served = Served(
        model_version=target.model_version,
        artifact_digest=target.artifact_digest,
        deployment=target.deployment,
        route_reason=answer.choice.reason,
        cost_nano_usd=answer.cost_nano_usd,
        request_id=answer.request_id,
        trace_id=answer.trace_id,
    )
    cached = {
        "hit_count": answer.lookup.hit_count,
        "cached_tokens": answer.usage.cached_tokens,
    }
    return {
        "usage": {
            "prompt_tokens": answer.usage.prompt_tokens,
            "total_tokens": answer.usage.prompt_tokens,
        },
        "headrace": {**served.to_json_object(), **cached},
    }


class OpenAIHandlers:
    """Serves the embeddings endpoint of OpenAI's API."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    def routes(self) -> list[HttpRoute]:
        """Returns the routes of the HTTP server."""
        return [HttpRoute("POST", EMBEDDINGS_PATH, self.create_embedding, scope=INFER)]

    async def create_embedding(self, call: HttpCall) -> None:
        """Turns texts into vectors.

        Raises:
            HeadraceError: the errors of `EmbeddingService.Embed`.
        """
        identity = call.identity
        request = parse_embedding_request(call.body)
        answer = await self._embedder.embed(
            Query(
                model=request.model,
                texts=request.texts,
                identity=identity,
                texts_field="input",
                dimensions=request.dimensions,
            )
        )
        call.respond(
            await write_embedding_response(answer, model=request.model, as_base64=request.as_base64)
        )
