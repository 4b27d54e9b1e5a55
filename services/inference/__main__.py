"""The inference service's parts, put together."""

from __future__ import annotations

from headrace.cost.v1 import cost_pb2, cost_pb2_grpc
from headrace.inference.v1 import inference_pb2_grpc
from headrace.openai.v1 import openai_pb2_grpc
from headrace.router.v1 import router_pb2, router_pb2_grpc

from libs.bus.connection import connect, ensure_streams
from libs.bus.publisher import Publisher
from libs.metering.prices import PriceBook
from libs.metering.usage import UsageRecorder
from libs.process import process, run
from libs.routes import RouteTable
from libs.rpc.channel import open_channel
from libs.rpc.watch import SnapshotWatch
from libs.telemetry.hashing import InputHasher
from services.inference.backends import Backends
from services.inference.config import Settings
from services.inference.embedding import Embedder
from services.inference.generation import Generator
from services.inference.openai import ChatCompletionServicer, ModelServicer
from services.inference.record import Recorder
from services.inference.servicer import InferenceServicer


async def main() -> None:
    """Runs the service until it is told to end."""
    settings = Settings()
    async with process("inference", settings) as running:
        clock = running.clock
        bus = await connect(settings.nats_url, name="inference")
        jetstream = bus.jetstream()
        await ensure_streams(jetstream)
        usage = UsageRecorder(Publisher(jetstream), clock)
        hasher = InputHasher.from_file(settings.input_hash_key_file)
        recorder = Recorder(usage=usage, hasher=hasher, clock=clock)
        backends = Backends()
        generator = Generator(backends=backends, recorder=recorder, clock=clock)
        embedder = Embedder(backends=backends)

        def take_routes(snapshot: router_pb2.WatchRoutesResponse) -> None:
            generator.routes = embedder.routes = RouteTable.of(snapshot)

        def take_prices(snapshot: cost_pb2.WatchPricesResponse) -> None:
            usage.prices = PriceBook(snapshot.prices)

        router = router_pb2_grpc.RouterServiceStub(
            open_channel(settings.router_address, traced=False)
        )
        cost = cost_pb2_grpc.CostServiceStub(open_channel(settings.cost_address, traced=False))
        routes = SnapshotWatch(
            "router",
            open_stream=lambda: router.WatchRoutes(router_pb2.WatchRoutesRequest()),
            on_snapshot=take_routes,
            clock=clock,
        )
        prices = SnapshotWatch(
            "cost",
            open_stream=lambda: cost.WatchPrices(cost_pb2.WatchPricesRequest()),
            on_snapshot=take_prices,
            clock=clock,
        )
        running.spawn(routes.run())
        running.spawn(prices.run())

        server = running.server.grpc
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceServicer(generator=generator, embedder=embedder, clock=clock), server
        )
        openai_pb2_grpc.add_ChatCompletionServiceServicer_to_server(
            ChatCompletionServicer(generator=generator, clock=clock), server
        )
        openai_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(generator), server)

        await routes.wait_first()
        await prices.wait_first()
        await running.serve()
        await recorder.drain()
        await backends.close()
        await bus.drain()


if __name__ == "__main__":
    run(main())
