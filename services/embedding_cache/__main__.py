"""The embedding cache's parts, put together."""

from __future__ import annotations

from libs.runtime import prepare

prepare()

from headrace.embedding.v1 import embedding_pb2_grpc
from headrace.inference.v1 import inference_pb2_grpc
from headrace.openai.v1 import openai_pb2_grpc

from libs.bus.connection import connect, ensure_streams
from libs.bus.publisher import Publisher
from libs.metering.usage import UsageRecorder
from libs.process import process, run
from libs.rpc.channel import open_channel
from libs.snapshots import Snapshots
from libs.telemetry.hashing import InputHasher
from services.embedding_cache.computation import Computation
from services.embedding_cache.config import Settings
from services.embedding_cache.embedder import Embedder
from services.embedding_cache.openai import OpenAIEmbeddingServicer
from services.embedding_cache.servicer import EmbeddingServicer
from services.embedding_cache.single_flight import SingleFlight
from services.embedding_cache.vector_cache import VectorCache


async def main() -> None:
    """Runs the service until it is told to end."""
    settings = Settings()
    async with process("embedding_cache", settings) as running:
        clock = running.clock
        bus = await connect(settings.nats_url, name="embedding_cache")
        jetstream = bus.jetstream()
        await ensure_streams(jetstream)

        snapshots = Snapshots(
            router_address=settings.router_address,
            cost_address=settings.cost_address,
            running=running,
        )
        usage = UsageRecorder(Publisher(jetstream), clock, prices=snapshots.prices)
        cache = VectorCache(limit_bytes=settings.embedding_cache_limit_bytes)
        flights = SingleFlight(keep=cache.put, limit_texts=settings.embedding_in_flight_limit_texts)
        computation = Computation(
            inference_pb2_grpc.InferenceServiceStub(open_channel(settings.inference_address)),
            timeout_seconds=settings.embedding_timeout_seconds,
        )

        embedder = Embedder(
            routes=snapshots.routes,
            cache=cache,
            flights=flights,
            computation=computation,
            usage=usage,
            hasher=InputHasher.from_file(settings.input_hash_key_file),
            clock=clock,
        )

        snapshots.start()

        embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(
            EmbeddingServicer(embedder), running.server.grpc
        )
        openai_pb2_grpc.add_EmbeddingServiceServicer_to_server(
            OpenAIEmbeddingServicer(embedder), running.server.grpc
        )

        await running.server.set_ready(True)

        await running.serve(ready=False)
        await bus.drain()


if __name__ == "__main__":
    run(main())
