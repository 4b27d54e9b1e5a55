"""The embedding cache while its dependencies are down."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headrace.embedding.v1 import embedding_pb2

from libs.bus.connection import connect
from libs.bus.subjects import USAGE
from libs.errors import HeadraceError, Unavailable
from libs.rpc.status import from_rpc_error
from tests.support.embedding import (
    ANN,
    STOP_SECONDS,
    EmbeddingCache,
    Peers,
    eventually,
    free_port,
    running_embedding_cache,
    serving_peers,
)
from tests.support.nats import NatsServer, running_nats

pytestmark = pytest.mark.integration


@pytest.fixture
async def nats_server(tmp_path: Path) -> AsyncIterator[NatsServer]:
    folder = tmp_path / "nats"
    folder.mkdir()
    async with running_nats(folder) as server:
        yield server


async def _embed(cache: EmbeddingCache, *texts: str) -> embedding_pb2.EmbedResponse:
    request = embedding_pb2.EmbedRequest(model="minilm", texts=texts)
    try:
        return await cache.stub.Embed(request, metadata=ANN.metadata())
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


async def _serves(cache: EmbeddingCache) -> bool:
    stub = health_pb2_grpc.HealthStub(cache.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest())
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def test_it_waits_for_routes_and_prices_and_then_serves(
    tmp_path: Path, nats_server: NatsServer
):
    """Started before its dependencies, it is not ready, and serves once they push snapshots."""
    address = f"127.0.0.1:{free_port()}"
    async with running_embedding_cache(
        tmp_path, peers_address=address, nats_url=nats_server.url
    ) as cache:
        assert not await _serves(cache)
        with pytest.raises(Unavailable) as caught:
            await _embed(cache, "a")
        assert caught.value.reason == "DEPENDENCY_UNAVAILABLE"
        assert caught.value.retry_after_seconds is not None
        async with serving_peers(Peers(), address=address):
            await eventually(lambda: _serves(cache))
            assert (await _embed(cache, "a")).hit_count == 0


async def test_hits_are_answered_while_all_peers_are_down(tmp_path: Path, nats_server: NatsServer):
    """Without router, cost and inference, cached vectors are still served and priced."""
    address = f"127.0.0.1:{free_port()}"
    async with running_embedding_cache(
        tmp_path, peers_address=address, nats_url=nats_server.url
    ) as cache:
        async with serving_peers(Peers(), address=address):
            await eventually(lambda: _serves(cache))
            first = await _embed(cache, "a b c")
        second = await _embed(cache, "a b c")
        assert second.hit_count == 1
        assert second.embeddings == first.embeddings
        assert 0 < second.cost_nano_usd < first.cost_nano_usd
        with pytest.raises(Unavailable):
            await _embed(cache, "new")
        async with serving_peers(Peers(), address=address):
            await eventually(lambda: _answers(cache, "new"))


async def _answers(cache: EmbeddingCache, text: str) -> bool:
    try:
        await _embed(cache, text)
    except HeadraceError:
        return False
    return True


async def test_requests_wait_for_a_restart_of_nats(tmp_path: Path, nats_server: NatsServer):
    """No answer is sent before its usage is stored, and a short outage is not an error."""
    async with (
        serving_peers(Peers()) as address,
        running_embedding_cache(tmp_path, peers_address=address, nats_url=nats_server.url) as cache,
    ):
        await eventually(lambda: _serves(cache))
        await _embed(cache, "a")
        await nats_server.kill()
        waiting = asyncio.create_task(_embed(cache, "a"))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        await nats_server.start()
        answer = await waiting
        assert answer.hit_count == 1
        client = await connect(nats_server.url, name="test")
        state = (await client.jetstream().stream_info(USAGE.name)).state
        await client.drain()
        assert state.messages == 2


async def test_a_full_cache_evicts_the_least_recently_used_vectors(
    tmp_path: Path, nats_server: NatsServer
):
    """The configured limit of memory holds, and all texts are still answered."""
    peers = Peers()
    async with (
        serving_peers(peers) as address,
        running_embedding_cache(
            tmp_path,
            peers_address=address,
            nats_url=nats_server.url,
            HEADRACE_EMBEDDING_CACHE_LIMIT_BYTES="20000",
        ) as cache,
    ):
        await eventually(lambda: _serves(cache))
        texts = [str(number) for number in range(30)]
        assert len((await _embed(cache, *texts)).embeddings) == 30
        assert (await _embed(cache, "29")).hit_count == 1
        assert (await _embed(cache, "0")).hit_count == 0


async def test_concurrent_computations_are_limited(tmp_path: Path, nats_server: NatsServer):
    """Beyond the limit a request is refused at once, with a time to retry."""
    peers = Peers()
    async with (
        serving_peers(peers) as address,
        running_embedding_cache(
            tmp_path,
            peers_address=address,
            nats_url=nats_server.url,
            HEADRACE_EMBEDDING_IN_FLIGHT_LIMIT_TEXTS="2",
        ) as cache,
    ):
        await eventually(lambda: _serves(cache))
        peers.inference.unblocked.clear()
        computing = asyncio.create_task(_embed(cache, "a", "b"))
        await eventually(lambda: len(peers.inference.batches) == 1)
        with pytest.raises(HeadraceError) as caught:
            await _embed(cache, "c")
        assert (caught.value.code, caught.value.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
        assert caught.value.retry_after_seconds is not None
        peers.inference.unblocked.set()
        assert (await computing).hit_count == 0


@pytest.mark.parametrize("ready", [True, False])
async def test_sigterm_stops_it_cleanly(tmp_path: Path, nats_server: NatsServer, ready: bool):
    """It exits with status 0, also while it waits for its first snapshot."""
    peers_address = f"127.0.0.1:{free_port()}"
    async with running_embedding_cache(
        tmp_path, peers_address=peers_address, nats_url=nats_server.url
    ) as cache:
        if ready:
            async with serving_peers(Peers(), address=peers_address):
                await eventually(lambda: _serves(cache))
        cache.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOP_SECONDS):
            assert await cache.process.wait() == 0
