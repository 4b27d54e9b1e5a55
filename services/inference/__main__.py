"""The inference service's parts, put together."""

from __future__ import annotations

from headrace.inference.v1 import inference_pb2, inference_pb2_grpc

from libs.bus.connection import connect, ensure_streams
from libs.bus.durability import check_durable
from libs.bus.publisher import Publisher
from libs.http1 import HttpServer
from libs.metering.prices import PriceBook
from libs.metering.usage import UsageRecorder
from libs.openai.errors import OpenAIDialect
from libs.process import process, run
from libs.routes import RouteTable
from libs.rpc.grpc_http1 import GrpcHttp1Handler
from libs.rpc.http_api import HttpApi
from libs.snapshots import Snapshots
from libs.telemetry.hashing import InputHasher
from services.inference.accounting import Recorder
from services.inference.api.grpc import GENERATE_PATH, InferenceServicer
from services.inference.api.oip import OpenInferenceServicer, handlers
from services.inference.api.openai import OpenAIHandlers
from services.inference.backends.openai_http.api_keys import ApiKeys
from services.inference.backends.pool import Backends
from services.inference.backends.stall import StallLimits
from services.inference.config import Settings
from services.inference.generation.generator import Generator
from services.inference.generation.hedging import HedgeLimits
from services.inference.generation.relay import RelayLimits
from services.inference.tensors.count_tokens import TokenCounter
from services.inference.tensors.embed import Embedder
from services.inference.tensors.oip import OpenInference


async def main() -> None:
    """Runs the service until it is told to end."""
    settings = Settings()
    async with process("inference", settings) as running:
        clock = running.clock
        if settings.nats_monitoring_url is not None:
            await check_durable(settings.nats_monitoring_url)
        bus = await connect(settings.nats_url, name="inference")
        jetstream = bus.jetstream()
        await ensure_streams(jetstream)
        usage = UsageRecorder(Publisher(jetstream), clock)
        hasher = InputHasher.from_file(settings.input_hash_key_file)
        recorder = Recorder(usage=usage, hasher=hasher, clock=clock)
        backends = Backends(
            clock=clock,
            keys=ApiKeys(settings.home / "secrets"),
            stall=StallLimits(
                first_token_seconds=settings.stall_first_token_seconds,
                between_tokens_seconds=settings.stall_between_tokens_seconds,
            ),
        )
        hedge = HedgeLimits(
            after_seconds=settings.hedge_after_seconds, max_share=settings.hedge_max_share
        )
        relay = RelayLimits(
            max_delay_seconds=settings.coalesce_max_delay_seconds,
            slow_reader_seconds=settings.slow_reader_seconds,
        )
        generator = Generator(
            backends=backends, recorder=recorder, hedge=hedge, relay=relay, clock=clock
        )
        embedder = Embedder(backends=backends)
        counter = TokenCounter(backends=backends)
        tensors = OpenInference(
            backends=backends, recorder=recorder, admission=generator.admission, clock=clock
        )

        def take_routes(routes: RouteTable) -> None:
            generator.routes = embedder.routes = counter.routes = tensors.routes = routes
            backends.retain(routes.backends())

        def take_prices(prices: PriceBook) -> None:
            usage.prices = prices

        snapshots = Snapshots(
            router_address=settings.router_address,
            cost_address=settings.cost_address,
            on_routes=take_routes,
            on_prices=take_prices,
            running=running,
        )
        snapshots.start()

        server = running.server.grpc
        servicer = InferenceServicer(
            generator=generator, embedder=embedder, counter=counter, clock=clock
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
        server.add_generic_rpc_handlers((handlers(OpenInferenceServicer(tensors, clock=clock)),))

        api = HttpApi(
            routes=OpenAIHandlers(generator=generator, clock=clock).routes(),
            grpc_methods=[
                GrpcHttp1Handler(
                    GENERATE_PATH,
                    servicer.Generate,
                    request_type=inference_pb2.GenerateRequest,
                    clock=clock,
                )
            ],
            is_ready=lambda: running.server.ready,
            clock=clock,
            dialect=OpenAIDialect(),
            longest_call_seconds=settings.longest_http_call_seconds,
        )
        http = HttpServer(
            settings.http_listen_address, api, drain_seconds=settings.drain_seconds, clock=clock
        )

        await running.serve(ready=False, beside=http)
        await recorder.drain()
        await backends.close()
        await bus.drain()


if __name__ == "__main__":
    run(main())
