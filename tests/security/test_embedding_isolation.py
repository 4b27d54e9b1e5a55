"""What one tenant can find out about another's texts through the embedding cache, or take from it.

The cache runs as a process, with a real NATS and an `inference` that the tests can hold up.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from headrace.embedding.v1 import embedding_pb2
from headrace.events.v1 import events_pb2
from nats.js import JetStreamContext

from libs.bus.connection import connect
from libs.bus.subjects import USAGE
from libs.errors import HeadraceError, ResourceExhausted
from libs.openai.bodies import EMBEDDINGS_PATH
from libs.rpc.identity import Identity
from libs.rpc.status import from_rpc_error
from services.embedding_cache.single_flight import TEXTS_PER_CALL
from tests.support.embedding import (
    ANN,
    EmbeddingCache,
    Inference,
    Peers,
    eventually,
    running_embedding_cache,
    serving_peers,
    tokens_of,
)
from tests.support.nats import running_nats

pytestmark = pytest.mark.integration

EVE = Identity("evil", "eve", frozenset({"infer"}))
BEN = Identity("acme", "ben", frozenset({"infer"}))


@dataclass
class _Mesh:
    inference: Inference
    cache: EmbeddingCache
    js: JetStreamContext

    async def embed(self, caller: Identity, *texts: str) -> embedding_pb2.EmbedResponse:
        request = embedding_pb2.EmbedRequest(model="minilm", texts=texts)
        try:
            return await self.cache.stub.Embed(request, metadata=caller.metadata())
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error

    async def usage_of(self, request_id: str) -> list[events_pb2.UsageRecorded]:
        """Returns the usage events of a request that are stored now."""
        found = []
        last = (await self.js.stream_info(USAGE.name)).state.last_seq
        for sequence in range(1, last + 1):
            stored = await self.js.get_msg(USAGE.name, sequence)
            event = events_pb2.UsageRecorded.FromString(stored.data or b"")
            if event.request_id == request_id:
                found.append(event)
        return found


@asynccontextmanager
async def _mesh(home: Path, **settings: str) -> AsyncIterator[_Mesh]:
    (home / "nats").mkdir()
    peers = Peers()
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running_nats(home / "nats"))
        address = await stack.enter_async_context(serving_peers(peers))
        cache = await stack.enter_async_context(
            running_embedding_cache(home, peers_address=address, nats_url=server.url, **settings)
        )
        client = await connect(server.url, name="test")
        stack.push_async_callback(client.drain)
        mesh = _Mesh(peers.inference, cache, client.jetstream())
        await eventually(lambda: _answers(mesh))
        yield mesh


async def _answers(mesh: _Mesh) -> bool:
    try:
        await mesh.embed(ANN, "first")
    except HeadraceError:
        return False
    return True


async def test_no_tenant_finds_out_which_texts_another_embedded(tmp_path: Path):
    """Not by the number of hits, the price, the time or a computation that it could join."""
    async with _mesh(tmp_path) as mesh:
        secret = f"secret {uuid.uuid4()}"
        first = await mesh.embed(ANN, secret)
        assert (await mesh.embed(BEN, secret)).hit_count == 1  # the same tenant
        mesh.inference.batches.clear()
        guess = await mesh.embed(EVE, secret)
        assert mesh.inference.batches == [("minilm@1.0.0", [secret])]
        other = await mesh.embed(EVE, f"unused {uuid.uuid4()}")
        for answer in (guess, other):
            assert (answer.hit_count, answer.usage.cached_tokens) == (0, 0)
        assert guess.cost_nano_usd == other.cost_nano_usd == first.cost_nano_usd
        assert guess.embeddings == first.embeddings

        mesh.inference.batches.clear()
        mesh.inference.unblocked.clear()
        running = f"running {uuid.uuid4()}"
        calls = [asyncio.create_task(mesh.embed(who, running)) for who in (ANN, BEN, EVE)]
        await eventually(lambda: len(mesh.inference.batches) == 2)
        mesh.inference.unblocked.set()
        hits = sorted([answer.hit_count for answer in await asyncio.gather(*calls)])
        assert hits == [0, 0, 1]
        assert len(mesh.inference.batches) == 2


async def test_a_model_can_be_shared_on_purpose(tmp_path: Path):
    """A setting names the models; the price of hits stays as it is."""
    async with _mesh(tmp_path, HEADRACE_EMBEDDING_SHARED_MODELS="other minilm") as mesh:
        text = f"public {uuid.uuid4()}"
        await mesh.embed(ANN, text)
        answer = await mesh.embed(EVE, text)
        assert (answer.hit_count, answer.usage.cached_tokens) == (1, tokens_of(text))


async def test_a_flood_neither_evicts_nor_refuses_others(tmp_path: Path):
    """One tenant fills the cache and its share of computations; the other one goes on."""
    limits = {
        "HEADRACE_EMBEDDING_CACHE_LIMIT_BYTES": str(1024 * 1024),
        "HEADRACE_EMBEDDING_IN_FLIGHT_LIMIT_TEXTS": "3000",
    }
    async with _mesh(tmp_path, **limits) as mesh:
        mine = [f"mine {number}" for number in range(100)]
        await mesh.embed(ANN, *mine)
        for number in range(4):
            await mesh.embed(EVE, *(f"flood {number} {index}" for index in range(500)))
        assert (await mesh.embed(ANN, *mine)).hit_count == len(mine)

        mesh.inference.batches.clear()
        mesh.inference.unblocked.clear()
        flood = [
            asyncio.create_task(mesh.embed(EVE, *(f"{number} {index}" for index in range(500))))
            for number in range(10)
        ]
        refused = 6  # 2,000 of 3,000 texts are its share
        await eventually(lambda: sum(call.done() for call in flood) == refused)
        for call in flood:
            if call.done():
                error = call.exception()
                assert isinstance(error, ResourceExhausted)
                assert error.reason == "QUEUE_FULL"
                assert error.metadata["limit"] == "2000"
        victim = asyncio.create_task(mesh.embed(ANN, *(f"new {index}" for index in range(500))))
        await eventually(lambda: len(mesh.inference.batches) >= 5)
        mesh.inference.unblocked.set()
        assert (await victim).hit_count == 0
        await asyncio.gather(*flood, return_exceptions=True)


async def test_what_was_computed_for_a_caller_who_left_is_billed(tmp_path: Path):
    """Also over HTTP; the rest of its texts is not computed any more."""
    async with _mesh(tmp_path) as mesh:
        texts = [f"left {number}" for number in range(2 * TEXTS_PER_CALL)]

        async def leave(send: Any) -> None:
            mesh.inference.batches.clear()
            mesh.inference.cancelled = 0
            mesh.inference.block_after = 1
            caller = asyncio.create_task(send())
            await eventually(lambda: len(mesh.inference.batches) == 2)
            caller.cancel()
            await eventually(lambda: mesh.inference.cancelled == 1)
            mesh.inference.unblocked.set()

        request_id = str(uuid.uuid4())

        async def over_grpc() -> None:
            request = embedding_pb2.EmbedRequest(request_id=request_id, model="minilm", texts=texts)
            await mesh.cache.stub.Embed(request, metadata=EVE.metadata())

        await leave(over_grpc)
        expected = sum(tokens_of(text) for text in texts[:TEXTS_PER_CALL])

        async def billed() -> bool:
            return bool(await mesh.usage_of(request_id))

        await eventually(billed)
        (event,) = await mesh.usage_of(request_id)
        assert event.identity.tenant == "tenants/evil"
        assert (event.usage.prompt_tokens, event.usage.cached_tokens) == (expected, 0)
        assert event.cost_nano_usd > 0
        again = await mesh.embed(EVE, *texts)
        assert again.hit_count == TEXTS_PER_CALL

        other = [f"other {text}" for text in texts]

        async def over_http() -> None:
            body = {"model": "minilm", "input": other}
            async with aiohttp.ClientSession(f"http://{mesh.cache.http_address}") as http:
                headers = dict(EVE.metadata())
                await http.post(EMBEDDINGS_PATH, json=body, headers=headers)

        before = (await mesh.js.stream_info(USAGE.name)).state.last_seq
        await leave(over_http)

        async def one_more() -> bool:
            return (await mesh.js.stream_info(USAGE.name)).state.last_seq == before + 1

        await eventually(one_more)


async def test_the_time_of_a_guess_says_nothing(tmp_path: Path):
    """A guess that another tenant embedded takes as long as one that nobody did."""
    async with _mesh(tmp_path) as mesh:
        mesh.inference.seconds = 0.05
        known = [f"known {number}" for number in range(8)]
        await mesh.embed(ANN, *known)

        async def seconds_of(text: str) -> float:
            started = time.perf_counter()
            await mesh.embed(EVE, text)
            return time.perf_counter() - started

        right = sorted([await seconds_of(text) for text in known])
        wrong = sorted([await seconds_of(f"unknown {number}") for number in range(8)])
        assert min(right[0], wrong[0]) >= mesh.inference.seconds
        assert right[4] < 2 * wrong[4]
