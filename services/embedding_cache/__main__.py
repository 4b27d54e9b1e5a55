"""Assembles and runs the embedding cache."""

from __future__ import annotations

from libs.runtime import prepare

prepare()

from headrace.embedding.v1 import embedding_pb2_grpc
from headrace.inference.v1 import inference_internal_pb2_grpc

from libs.bus.connection import ensure_streams
from libs.bus.publisher import Publisher
from libs.bus.service import connect_service
from libs.bus.subjects import USAGE
from libs.http1 import HttpServer
from libs.metering.usage import UsageRecorder
from libs.openai.errors import OpenAIDialect
from libs.process import process, run
from libs.rpc.channel import open_channel
from libs.rpc.http_api import HttpApi
from libs.snapshots import Snapshots
from libs.telemetry.hashing import InputHasher
from services.embedding_cache.config import Settings
from services.embedding_cache.embedder import Embedder
from services.embedding_cache.inference_client import InferenceClient
from services.embedding_cache.openai import OpenAIHandlers
from services.embedding_cache.servicer import EmbeddingServicer
from services.embedding_cache.single_flight import SingleFlight
from services.embedding_cache.vector_cache import VectorCache


async def main() -> None:
    """Runs the service until it receives SIGTERM."""
    settings = Settings()
    async with process("embedding_cache", settings) as running:
        clock = running.clock
        bus = await connect_service(settings, name="embedding_cache")
        jetstream = bus.jetstream()
        await ensure_streams(jetstream, streams=[USAGE], update=False)

        snapshots = Snapshots(
            router_address=settings.router_address,
            cost_address=settings.cost_address,
            tls=settings.tls,
            running=running,
        )
        usage = UsageRecorder(Publisher(jetstream), clock, prices=snapshots.prices)
        cache = VectorCache(limit_bytes=settings.embedding_cache_limit_bytes)
        single_flight = SingleFlight(
            store=cache.put, limit_texts=settings.embedding_in_flight_limit_texts
        )
        inference = InferenceClient(
            inference_internal_pb2_grpc.InferenceInternalServiceStub(
                open_channel(settings.inference_address, tls=settings.tls)
            ),
            timeout_seconds=settings.embedding_timeout_seconds,
        )

        embedder = Embedder(
            routes=snapshots.routes,
            cache=cache,
            single_flight=single_flight,
            inference=inference,
            usage=usage,
            hasher=InputHasher.from_file(settings.input_hash_key_file),
            shared_models=settings.embedding_shared_models.split(),
            memory_limit_bytes=settings.embedding_request_memory_limit_bytes,
            clock=clock,
        )

        snapshots.start()

        embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(
            EmbeddingServicer(embedder), running.server.grpc
        )
        api = HttpApi(
            routes=OpenAIHandlers(embedder).routes(),
            is_ready=lambda: running.server.ready,
            clock=clock,
            dialect=OpenAIDialect(),
            longest_call_seconds=settings.longest_http_call_seconds,
        )
        http = HttpServer(
            settings.http_listen_address,
            api,
            drain_seconds=settings.drain_seconds,
            clock=clock,
            tls=settings.tls,
            arrival_limits=settings.arrival_limits,
        )

        await running.serve(ready=False, http=http)
        await embedder.drain()
        await bus.drain()


if __name__ == "__main__":
    run(main())
