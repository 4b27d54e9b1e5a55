"""The embedding cache as a process, over real gRPC, with a real NATS."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc
import pytest
import pytest_asyncio
from headrace.common.v1 import usage_pb2
from headrace.embedding.v1 import embedding_pb2
from headrace.events.v1 import events_pb2
from nats.js import JetStreamContext

from libs.bus.connection import connect
from libs.bus.subjects import USAGE
from libs.embedding_texts import MAX_TEXTS
from libs.errors import HeadraceError, Unavailable
from libs.metering.prices import rates_of
from libs.metering.usage import cost_of
from libs.rpc.status import from_rpc_error
from tests.support.embedding import (
    ANN,
    DIGEST,
    PRICE,
    EmbeddingCache,
    Peers,
    eventually,
    running_embedding_cache,
    serving_peers,
    tokens_of,
    vector_of,
)
from tests.support.nats import running_nats

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]


@dataclass
class _Mesh:
    peers: Peers
    cache: EmbeddingCache
    js: JetStreamContext


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory) -> AsyncIterator[_Mesh]:
    home = tmp_path_factory.mktemp("embedding")
    (home / "nats").mkdir()
    peers = Peers()
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running_nats(home / "nats"))
        address = await stack.enter_async_context(serving_peers(peers))
        cache = await stack.enter_async_context(
            running_embedding_cache(home, peers_address=address, nats_url=server.url)
        )
        client = await connect(server.url, name="test")
        stack.push_async_callback(client.drain)
        await eventually(lambda: _answers(cache))
        yield _Mesh(peers, cache, client.jetstream())


@pytest.fixture
def mesh(running: _Mesh) -> _Mesh:
    """The mesh that all tests share, reset before each."""
    inference = running.peers.inference
    inference.batches.clear()
    inference.cancelled = 0
    inference.error = None
    inference.digest = DIGEST
    inference.unblocked.set()
    return running


async def _answers(cache: EmbeddingCache) -> bool:
    try:
        await _embed(cache, ["first"])
    except HeadraceError:
        return False
    return True


async def _embed(
    cache: EmbeddingCache, texts: list[str], *, model: str = "minilm", request_id: str = ""
) -> embedding_pb2.EmbedResponse:
    request = embedding_pb2.EmbedRequest(model=model, texts=texts, request_id=request_id)
    try:
        return await cache.stub.Embed(request, metadata=ANN.metadata())
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


async def _last_event(js: JetStreamContext) -> events_pb2.UsageRecorded:
    """Returns the newest usage event that is stored now; does not wait."""
    sequence = (await js.stream_info(USAGE.name)).state.last_seq
    stored = await js.get_msg(USAGE.name, sequence)
    return events_pb2.UsageRecorded.FromString(stored.data or b"")


def _new(*texts: str) -> list[str]:
    """Returns texts that no other test uses."""
    return [f"{text} {uuid.uuid4()}" for text in texts]


async def test_misses_are_computed_and_hits_come_from_memory(mesh: _Mesh):
    """Vectors are in the order of the texts, and only new texts are sent to inference."""
    a, b, c = _new("a", "b b", "c c c")
    first = await _embed(mesh.cache, [a, b])
    assert (first.hit_count, first.usage.cached_tokens) == (0, 0)
    second = await _embed(mesh.cache, [b, c, a, c])
    assert [list(item.values) for item in second.embeddings] == [
        vector_of(text) for text in (b, c, a, c)
    ]
    assert mesh.peers.inference.batches == [("minilm@1.0.0", [a, b]), ("minilm@1.0.0", [c])]
    assert second.hit_count == 3
    assert second.usage.prompt_tokens == sum(tokens_of(text) for text in (b, c, a, c))
    assert second.usage.cached_tokens == sum(tokens_of(text) for text in (b, a, c))
    assert second.usage.completion_tokens == 0
    assert second.model_version == "models/minilm/versions/1.0.0"
    assert second.artifact_digest == DIGEST
    assert second.route.deployment == "deployments/minilm"
    assert len(second.trace_id) == 32
    assert uuid.UUID(second.request_id).version == 7


async def test_a_version_shares_its_vectors_with_the_model_name(mesh: _Mesh):
    """Vectors are cached by artifact, whichever name the request uses."""
    texts = _new("a")
    await _embed(mesh.cache, texts, model="minilm")
    assert (await _embed(mesh.cache, texts, model="minilm@1.0.0")).hit_count == 1


async def test_usage_is_stored_before_the_answer(mesh: _Mesh):
    """When the answer arrives, its event is in the stream, with the same cost."""
    a, b = _new("a", "b b")
    await _embed(mesh.cache, [a])
    request_id = str(uuid.uuid4())
    answer = await _embed(mesh.cache, [a, b], request_id=request_id)
    event = await _last_event(mesh.js)
    assert answer.request_id == event.request_id == request_id
    assert (event.identity.tenant, event.identity.user) == ("tenants/acme", "ann")
    assert (event.model, event.model_version) == ("minilm", answer.model_version)
    assert (event.operation, event.price) == (usage_pb2.OPERATION_EMBED, PRICE.name)
    assert event.usage == answer.usage
    expected = usage_pb2.TokenUsage(
        prompt_tokens=tokens_of(a) + tokens_of(b), cached_tokens=tokens_of(a)
    )
    assert answer.usage == expected
    assert answer.cost_nano_usd == event.cost_nano_usd == cost_of(expected, rates_of(PRICE))
    assert answer.cost_nano_usd > 0


async def test_identity_is_passed_to_inference(mesh: _Mesh):
    """Inference gets the tenant and the user of the request."""
    await _embed(mesh.cache, _new("a"))
    assert mesh.peers.inference.metadata["x-headrace-tenant"] == "acme"
    assert mesh.peers.inference.metadata["x-headrace-user"] == "ann"


async def test_cancelling_the_first_request_does_not_affect_the_others(mesh: _Mesh):
    """The others get the vectors of the same computation."""
    inference = mesh.peers.inference
    inference.unblocked.clear()
    texts = _new("a", "b")
    joined_metric = 'headrace_embedding_cache_answered_texts_total{source="joined"}'
    joined_before = (await _metrics(mesh.cache))[joined_metric]

    async def all_joined() -> bool:
        return (await _metrics(mesh.cache))[joined_metric] - joined_before == 2 * len(
            joined_requests
        )

    request = embedding_pb2.EmbedRequest(model="minilm", texts=texts)
    first_request = mesh.cache.stub.Embed(request, metadata=ANN.metadata())
    await eventually(lambda: len(inference.batches) == 1)
    joined_requests = [asyncio.create_task(_embed(mesh.cache, texts)) for _ in range(20)]
    await eventually(all_joined)
    first_request.cancel()
    inference.unblocked.set()
    answers = await asyncio.gather(*joined_requests)
    assert all(
        [list(item.values) for item in answer.embeddings] == list(map(vector_of, texts))
        for answer in answers
    )
    assert all(answer.hit_count == 2 for answer in answers)
    assert len(inference.batches) == 1
    assert inference.cancelled == 0


async def _metrics(cache: EmbeddingCache) -> dict[str, float]:
    async with aiohttp.ClientSession() as http, http.get(cache.metrics_url) as response:
        lines = (await response.text()).splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


async def test_a_computation_is_cancelled_when_all_clients_cancel(mesh: _Mesh):
    """The call to inference ends when no request waits for it."""
    inference = mesh.peers.inference
    inference.unblocked.clear()
    texts = _new("a")
    request = embedding_pb2.EmbedRequest(model="minilm", texts=texts)
    calls = [mesh.cache.stub.Embed(request, metadata=ANN.metadata()) for _ in range(3)]
    await eventually(lambda: len(inference.batches) == 1)
    for call in calls:
        call.cancel()
    await eventually(lambda: inference.cancelled == 1)
    inference.unblocked.set()
    assert (await _embed(mesh.cache, texts)).hit_count == 0


async def test_a_failure_is_passed_on_unchanged_and_not_cached(mesh: _Mesh):
    """All waiting requests get the error of inference; the next request is answered."""
    inference = mesh.peers.inference
    inference.error = Unavailable(
        "triton-0 died", reason="BACKEND_FAILED", metadata={"backend": "triton-0"}
    )
    texts = _new("a")
    calls = [_embed(mesh.cache, texts) for _ in range(3)]
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(outcome, Unavailable)
        assert outcome.reason == "BACKEND_FAILED"
        assert outcome.metadata == {"backend": "triton-0"}
    inference.error = None
    assert (await _embed(mesh.cache, texts)).hit_count == 0


async def test_vectors_of_another_artifact_are_refused(mesh: _Mesh):
    """They are neither returned nor cached under the routed digest."""
    mesh.peers.inference.digest = "sha256:" + "00" * 32
    texts = _new("a")
    with pytest.raises(Unavailable) as caught:
        await _embed(mesh.cache, texts)
    assert caught.value.reason == "MODEL_NOT_READY"
    assert caught.value.retry_after_seconds is not None
    mesh.peers.inference.digest = DIGEST
    assert (await _embed(mesh.cache, texts)).hit_count == 0


@pytest.mark.parametrize(
    ("invalid", "code", "reason", "field"),
    [
        ({"model": "gpt-9"}, "NOT_FOUND", "MODEL_NOT_FOUND", None),
        ({"model": ""}, "NOT_FOUND", "MODEL_NOT_FOUND", None),
        ({"model": "smollm2"}, "INVALID_ARGUMENT", "MODEL_KIND_MISMATCH", "model"),
        ({"model": "later"}, "UNAVAILABLE", "MODEL_NOT_READY", None),
        ({"texts": []}, "INVALID_ARGUMENT", "INVALID_FIELD", "texts"),
        ({"texts": ["a", ""]}, "INVALID_ARGUMENT", "INVALID_FIELD", "texts[1]"),
        ({"texts": ["a"] * (MAX_TEXTS + 1)}, "INVALID_ARGUMENT", "INVALID_FIELD", "texts"),
        ({"texts": ["a" * 4_150_000]}, "INVALID_ARGUMENT", "MESSAGE_TOO_LARGE", "texts"),
        ({"request_id": "7"}, "INVALID_ARGUMENT", "INVALID_FIELD", "request_id"),
    ],
)
async def test_an_invalid_request_gets_a_specific_error(
    mesh: _Mesh, invalid: dict[str, object], code: str, reason: str, field: str | None
):
    """Each error has its status, its reason and, if there is one, its field."""
    events_before = (await mesh.js.stream_info(USAGE.name)).state.last_seq
    with pytest.raises(HeadraceError) as caught:
        await _embed(mesh.cache, **{"texts": ["a"], **invalid})  # type: ignore[arg-type]  # values of several types
    error = caught.value
    assert (error.code, error.reason) == (code, reason)
    assert [name for name, _ in error.field_violations] == ([field] if field else [])
    if reason == "MODEL_NOT_FOUND":
        assert error.metadata["models"] == "later,minilm,smollm2"
    assert not mesh.peers.inference.batches
    assert (await mesh.js.stream_info(USAGE.name)).state.last_seq == events_before


async def test_a_call_without_identity_is_refused(mesh: _Mesh):
    """Without a tenant, no one could be billed."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.cache.stub.Embed(embedding_pb2.EmbedRequest(model="minilm", texts=["a"]))
    assert from_rpc_error(caught.value).reason == "TOKEN_INVALID"


async def test_the_log_has_hashes_instead_of_inputs(mesh: _Mesh):
    """Equal inputs have equal hashes; the inputs are not in the log."""
    (secret,) = _new("secret")
    for _ in range(2):
        await _embed(mesh.cache, [secret])
    await _embed(mesh.cache, _new("other"))

    def last_entries() -> list[dict[str, Any]]:
        return [e for e in mesh.cache.lines if e["event"] == "embedded"][-3:]

    def hashes_match() -> bool:
        hashes = [entry["input_hash"] for entry in last_entries()]
        return len(hashes) == 3 and hashes[0] == hashes[1] != hashes[2]

    await eventually(hashes_match)
    one, *_ = last_entries()
    assert (one["tenant"], one["model_version"]) == ("acme", "models/minilm/versions/1.0.0")
    assert len(one["trace_id"]) == 32
    assert secret not in str(mesh.cache.lines)


async def test_metrics_have_hits_misses_and_size(mesh: _Mesh):
    """The metrics count texts by source, vectors, bytes and requests."""
    name = "headrace_embedding_cache_"
    before = await _metrics(mesh.cache)
    a, b = _new("a", "b")
    await _embed(mesh.cache, [a, b, a])
    await _embed(mesh.cache, [a])
    after = await _metrics(mesh.cache)
    increase = {key: after[key] - before.get(key, 0.0) for key in after}
    answered = {
        source: increase[f'{name}answered_texts_total{{source="{source}"}}']
        for source in ("cache", "joined", "repeated", "computed")
    }
    assert answered == {"cache": 1, "joined": 0, "repeated": 1, "computed": 2}
    assert increase[f"{name}size_vectors"] == 2
    assert 0 < after[f"{name}size_bytes"] < after[f"{name}limit_bytes"]
    assert after[f"{name}in_flight_texts"] == 0
    durations = [
        key for key in increase if key.startswith("gen_ai_server_request_duration_seconds_count")
    ]
    assert sum(increase[key] for key in durations) == 2
