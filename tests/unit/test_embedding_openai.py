"""OpenAI's embeddings, checked with the types of the `openai` package."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence

import pytest
from headrace.common.v1 import embedding_pb2, usage_pb2
from headrace.router.v1 import router_internal_pb2 as router_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import CreateEmbeddingResponse

from libs.errors import InvalidArgument, Unavailable
from libs.routes import Choice
from services.embedding_cache.domain import Lookup, Vector
from services.embedding_cache.openai import (
    VECTORS_PER_BATCH,
    parse_embedding_request,
    write_embedding_response,
)
from services.embedding_cache.query import Answer
from services.embedding_cache.wire import from_embedding, to_response, values_of

_FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def _body(**members: object) -> bytes:
    return json.dumps({"model": "minilm", "input": "hello"} | members).encode()


def _vector(values: Sequence[float], token_count: int = 3) -> Vector:
    embedding = embedding_pb2.Embedding(values=values, token_count=token_count)
    return from_embedding(embedding, dimensions=len(values))


def _answer(vectors: Sequence[Vector]) -> Answer:
    target = router_pb2.RouteTarget(
        deployment="deployments/minilm",
        model_version="models/minilm/versions/1.0.0",
        artifact_digest="sha256:" + "ab" * 32,
    )
    lookup = Lookup(vectors, computed=frozenset({0}))
    return Answer(
        lookup=lookup,
        choice=Choice(target, "highest ready version: 1.0.0", "minilm", "e", 1),
        usage=usage_pb2.TokenUsage(
            prompt_tokens=lookup.token_count, cached_tokens=lookup.cached_token_count
        ),
        cost_nano_usd=42,
        request_id="0198c5f0-0000-7000-8000-000000000000",
        trace_id="c" * 32,
    )


def test_every_field_is_parsed():
    """All fields are parsed; `user` is ignored and `null` means not set."""
    request = parse_embedding_request(
        _body(input=["a", "b"], encoding_format="base64", dimensions=384, user="ann")
    )
    assert (request.model, request.texts) == ("minilm", ("a", "b"))
    assert (request.dimensions, request.as_base64) == (384, True)
    request = parse_embedding_request(_body(encoding_format=None, dimensions=None))
    assert (request.texts, request.dimensions, request.as_base64) == (("hello",), None, False)


@pytest.mark.parametrize(
    ("member", "value", "path"),
    [
        ("input", [1, 2, 3], "input"),
        ("input", [[1, 2], [3]], "input"),
        ("input", {"text": "a"}, "input"),
        ("input", 3, "input"),
        ("input", ["a", None], "input[1]"),
        ("input", ["\ud800"], "input[0]"),
        ("model", None, "model"),
        ("encoding_format", "int8", "encoding_format"),
        ("dimensions", "384", "dimensions"),
        ("stream", True, "stream"),
    ],
)
def test_unsupported_values_are_refused_with_the_field(member: str, value: object, path: str):
    """The error names the field as OpenAI's `param` does."""
    with pytest.raises(InvalidArgument) as caught:
        parse_embedding_request(_body(**{member: value}))
    assert caught.value.field_violations[0][0] == path


async def test_the_openai_package_parses_both_formats():
    """Floats and base64 carry the same numbers, in the order of the texts."""
    vectors = [_vector([index / 3, -1.0, 1e-30]) for index in range(VECTORS_PER_BATCH + 2)]
    answer = _answer(vectors)
    plain = await write_embedding_response(answer, model="minilm", as_base64=False)
    encoded = await write_embedding_response(answer, model="minilm", as_base64=True)
    read = CreateEmbeddingResponse.model_validate_json(plain)
    assert [item.index for item in read.data] == list(range(len(vectors)))
    for item, raw, vector in zip(read.data, json.loads(encoded)["data"], vectors, strict=True):
        packed = struct.pack("<3f", *values_of(vector))
        assert struct.pack("<3f", *item.embedding) == packed
        assert base64.b64decode(raw["embedding"]) == packed
    assert read.usage.prompt_tokens == read.usage.total_tokens == 3 * len(vectors)
    assert read.model == "minilm"


async def test_a_response_has_version_and_cost():
    """They are in the member `headrace`."""
    body = await write_embedding_response(
        _answer([_vector([1.0])] * 2), model="minilm", as_base64=True
    )
    origin = json.loads(body)["headrace"]
    assert origin["model_version"] == "models/minilm/versions/1.0.0"
    assert origin["cost_nano_usd"] == 42
    assert (origin["hit_count"], origin["cached_tokens"]) == (1, 3)


# Durations depend on the load of the machine.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(_FLOATS, min_size=1, max_size=20))
async def test_any_float32_survives_as_text(values: list[float]):
    """Nine digits are enough to restore the exact number."""
    body = await write_embedding_response(
        _answer([_vector(values)]), model="minilm", as_base64=False
    )
    (item,) = json.loads(body)["data"]
    packed = struct.pack(f"<{len(values)}f", *item["embedding"])
    assert list(struct.unpack(f"<{len(values)}f", packed)) == values


def test_the_grpc_response_has_the_vectors_unchanged():
    """Values, token counts and usage are those of the lookup."""
    response = to_response(_answer([_vector([0.25, -2.0], 7), _vector([1.5, 0.0], 2)]))
    assert [list(item.values) for item in response.embeddings] == [[0.25, -2.0], [1.5, 0.0]]
    assert [item.token_count for item in response.embeddings] == [7, 2]
    assert response.hit_count == 1
    assert (response.usage.prompt_tokens, response.usage.cached_tokens) == (9, 2)
    assert response.route.deployment == "deployments/minilm"


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_an_invalid_vector_of_a_backend_is_not_cached(values: list[float]):
    """A wrong length or a value that is not finite is a failure of the backend."""
    with pytest.raises(Unavailable):
        from_embedding(embedding_pb2.Embedding(values=values), dimensions=2)
