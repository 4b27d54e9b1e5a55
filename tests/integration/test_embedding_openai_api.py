"""`POST /v1/embeddings` through a real Envoy, by the unmodified `openai` client."""

from __future__ import annotations

import base64
import json
import struct
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import aiohttp
import openai
import pytest
import pytest_asyncio

from libs.embedding_texts import MAX_TEXTS
from tests.support.edge import RunningEdge, running_edge
from tests.support.embedding import (
    DIGEST,
    DIMENSIONS,
    Peers,
    running_embedding_cache,
    serving_peers,
    tokens_of,
    vector_of,
)
from tests.support.nats import running_nats

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]


@dataclass
class _Mesh:
    edge: RunningEdge
    client: openai.AsyncOpenAI
    http: aiohttp.ClientSession

    async def post(self, body: bytes) -> tuple[int, bytes]:
        """Posts a body unchanged; returns the status and the body of the response."""
        headers = {**self.edge.bearer(), "content-type": "application/json"}
        async with self.http.post("/v1/embeddings", data=body, headers=headers) as answer:
            return answer.status, await answer.read()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory) -> AsyncIterator[_Mesh]:
    home = tmp_path_factory.mktemp("embedding")
    (home / "nats").mkdir()
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running_nats(home / "nats"))
        address = await stack.enter_async_context(serving_peers(Peers()))
        cache = await stack.enter_async_context(
            running_embedding_cache(home, peers_address=address, nats_url=server.url)
        )
        edge = await stack.enter_async_context(
            running_edge(home, {"embedding_cache_http": [cache.http_address]})
        )
        await edge.cluster_is_healthy("embedding_cache_http")
        client = await stack.enter_async_context(
            openai.AsyncOpenAI(base_url=f"{edge.url}/v1", api_key=edge.token(), max_retries=0)
        )
        http = await stack.enter_async_context(aiohttp.ClientSession(edge.url))
        yield _Mesh(edge, client, http)


def _float32(values: list[float]) -> list[float]:
    """Returns numbers rounded to float32."""
    floats = struct.Struct(f"<{len(values)}f")
    return list(floats.unpack(floats.pack(*values)))


async def test_the_openai_client_gets_vectors(mesh: _Mesh):
    """One text or many, in the client's default encoding (base64) or as floats."""
    texts = [f"{word} {uuid.uuid4()}" for word in ("a", "b b")]
    one = await mesh.client.embeddings.create(model="minilm", input=texts[0])
    assert [item.embedding for item in one.data] == [vector_of(texts[0])]
    many = await mesh.client.embeddings.create(
        model="minilm@1.0.0",
        input=texts,
        encoding_format="float",
        dimensions=DIMENSIONS,
        user="ann",
    )
    assert [_float32(item.embedding) for item in many.data] == [vector_of(text) for text in texts]
    assert [item.index for item in many.data] == [0, 1]
    assert many.model == "minilm@1.0.0"
    assert many.usage.prompt_tokens == many.usage.total_tokens == sum(map(tokens_of, texts))
    assert many.model_extra is not None
    origin = many.model_extra["headrace"]
    assert (origin["artifact_digest"], origin["hit_count"]) == (DIGEST, 1)
    assert origin["cost_nano_usd"] > 0
    assert len(origin["trace_id"]) == 32


async def test_the_largest_request_works_in_both_formats(mesh: _Mesh):
    """Request and response pass the edge."""
    texts = [f"{number} {uuid.uuid4()}" for number in range(MAX_TEXTS)]
    for encoding in ("base64", "float"):
        body = {"model": "minilm", "input": texts, "encoding_format": encoding}
        status, answer = await mesh.post(json.dumps(body).encode())
        assert status == 200
        assert len(json.loads(answer)["data"]) == MAX_TEXTS


async def test_base64_is_little_endian_float32(mesh: _Mesh):
    """This is how clients decode it."""
    body = {"model": "minilm", "input": "a", "encoding_format": "base64"}
    status, answer = await mesh.post(json.dumps(body).encode())
    assert status == 200
    encoded = json.loads(answer)["data"][0]["embedding"]
    values = struct.unpack(f"<{DIMENSIONS}f", base64.b64decode(encoded))
    assert list(values) == vector_of("a")


async def test_an_unknown_model_is_a_not_found_error(mesh: _Mesh):
    """The client raises `NotFoundError` with the code of Headrace."""
    with pytest.raises(openai.NotFoundError) as caught:
        await mesh.client.embeddings.create(model="gpt-9", input="a")
    assert (caught.value.code, caught.value.type) == ("model_not_found", "not_found_error")
    assert "gpt-9" in caught.value.message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "minilm", "input": [1, 2]}, "input"),
        ({"model": "minilm", "input": ""}, "input[0]"),
        ({"model": "minilm", "input": ["a", ""]}, "input[1]"),
        ({"model": "minilm"}, "input"),
        ({"input": "a"}, "model"),
        ({"model": "minilm", "input": "a", "dimensions": 4}, "dimensions"),
        ({"model": "smollm2", "input": "a"}, "model"),
        ({"model": "minilm", "input": "a", "encoding_format": "int8"}, "encoding_format"),
    ],
)
async def test_an_invalid_field_is_named_in_openais_format(
    mesh: _Mesh, body: dict[str, object], param: str
):
    """Status 400, with the member in `param`."""
    status, answer = await mesh.post(json.dumps(body).encode())
    error = json.loads(answer)["error"]
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert error["message"]


async def test_invalid_json_is_an_error_of_the_caller(mesh: _Mesh):
    """Status 400, not 500."""
    status, answer = await mesh.post(b'{"model": "minilm", "input": "a')
    assert status == 400
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"


async def test_a_wrong_token_is_refused(mesh: _Mesh):
    """The client raises `AuthenticationError`."""
    with pytest.raises(openai.AuthenticationError):
        await mesh.client.with_options(api_key="wrong").embeddings.create(model="minilm", input="a")
