"""Composes the inference service and runs it."""

from __future__ import annotations

from libs.runtime import prepare

prepare(streams_tokens=True)

from headrace.inference.v1 import (
    inference_internal_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)

from libs.bus.connection import ensure_streams
from libs.bus.publisher import Publisher
from libs.bus.service import connect_service
from libs.bus.subjects import USAGE
from libs.clock import Clock
from libs.http1 import HttpServer
from libs.http_client import AddressPolicy, Network, Proxies
from libs.metering.usage import UsageRecorder
from libs.openai.errors import OpenAIDialect
from libs.process import Process, process, run
from libs.routes import RouteTable
from libs.rpc.channel import MAX_MESSAGE_BYTES
from libs.rpc.grpc_http1 import GrpcHttp1Handler
from libs.rpc.http_api import HttpApi
from libs.snapshots import Snapshots
from libs.telemetry.hashing import InputHasher
from services.inference.accounting import Recorder
from services.inference.admission import Admission
from services.inference.api.arrivals import Arrivals
from services.inference.api.grpc import GENERATE_PATH, InferenceInternalServicer, InferenceServicer
from services.inference.api.oip import OpenInferenceServicer, handlers, stream_handlers
from services.inference.api.openai import OpenAIHandlers
from services.inference.backends.openai_http.api_keys import ApiKeys
from services.inference.backends.pool import Backends
from services.inference.backends.stall import StallLimits
from services.inference.cache_salts import CacheSalts
from services.inference.config import Settings
from services.inference.generation.generator import Generator
from services.inference.generation.hedging import HedgeLimits
from services.inference.generation.relay import RelayLimits
from services.inference.tensors.count_tokens import TokenCounter
from services.inference.tensors.embed import Embedder
from services.inference.tensors.oip import OpenInference


async def main() -> None:
    """Runs the service until it is stopped."""
    settings = Settings()
    # Tensors are larger than other requests.
    async with process("inference", settings, max_message_bytes=MAX_MESSAGE_BYTES) as running:
        clock = running.clock
        bus = await connect_service(settings, name="inference")
        jetstream = bus.jetstream()
        await ensure_streams(jetstream, streams=[USAGE], update=False)
        snapshots = Snapshots(
            router_address=settings.router_address,
            cost_address=settings.cost_address,
            tls=settings.tls,
            running=running,
        )
        routes = snapshots.routes
        usage = UsageRecorder(Publisher(jetstream), clock, prices=snapshots.prices)
        hasher = InputHasher.from_file(settings.input_hash_key_file)
        recorder = Recorder(
            usage=usage,
            hasher=hasher,
            clock=clock,
            uncounted_limit_bytes=settings.uncounted_prompts_limit_bytes,
        )
        backends = _backends(settings, clock)

        cache_salts = CacheSalts(hasher)
        admission = Admission(
            clock,
            memory_limit_bytes=settings.request_memory_limit_bytes,
            weights=settings.weights_of_tenants(),
            target_seconds=settings.backend_target_seconds,
        )
        counter = TokenCounter(routes=routes, backends=backends, admission=admission)
        generator = Generator(
            routes=routes,
            backends=backends,
            admission=admission,
            recorder=recorder,
            hedge=_hedge_limits(settings),
            relay=_relay_limits(settings),
            cache_salts=cache_salts,
            count_prompt=counter.count_unfinished,
            clock=clock,
        )
        embedder = Embedder(
            routes=routes,
            backends=backends,
            admission=admission,
            recorder=recorder,
            clock=clock,
        )
        tensors = OpenInference(
            count_prompt=counter.count_unfinished,
            routes=routes,
            backends=backends,
            recorder=recorder,
            admission=admission,
            cache_salts=cache_salts,
            clock=clock,
        )

        def prepare(table: RouteTable) -> RouteTable:
            """Returns the routes that this process can use; releases what they do not need."""
            usable = backends.callable_routes(table)
            backends.retain(usable.backends())
            admission.update(usable)
            return usable

        snapshots.start(prepare_routes=prepare)

        servicer = InferenceServicer(
            generator=generator,
            counter=counter,
            clock=clock,
        )
        server = running.server.grpc
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
        inference_internal_pb2_grpc.add_InferenceInternalServiceServicer_to_server(
            InferenceInternalServicer(embedder, clock), server
        )
        arrivals = Arrivals(admission.memory, clock, max_streams=settings.max_tensor_streams)
        tensor_servicer = OpenInferenceServicer(tensors, arrivals, clock=clock)
        server.add_generic_rpc_handlers((handlers(tensor_servicer),))
        streams = server
        if settings.stream_listen_address is not None:
            streams = running.add_server(
                settings.stream_listen_address,
                max_message_bytes=settings.stream_message_limit_bytes,
            ).grpc
        streams.add_generic_rpc_handlers((stream_handlers(tensor_servicer),))
        openai = OpenAIHandlers(generator=generator, routes=routes, clock=clock)

        await running.serve(ready=False, http=_http_server(settings, running, servicer, openai))
        await embedder.drain()
        await tensors.drain()
        await recorder.drain()
        await backends.close()
        await bus.drain()


def _hedge_limits(settings: Settings) -> HedgeLimits:
    return HedgeLimits(
        after_seconds=settings.hedge_after_seconds, max_share=settings.hedge_max_share
    )


def _relay_limits(settings: Settings) -> RelayLimits:
    return RelayLimits(
        max_delay_seconds=settings.coalesce_max_delay_seconds,
        slow_reader_seconds=settings.slow_reader_seconds,
    )


def _backends(settings: Settings, clock: Clock) -> Backends:
    return Backends(
        clock=clock,
        tls=settings.tls,
        keys=ApiKeys(settings.home / "secrets", clock=clock),
        stall=StallLimits(
            first_token_seconds=settings.stall_first_token_seconds,
            between_tokens_seconds=settings.stall_between_tokens_seconds,
        ),
        network=Network(
            ca_file=settings.provider_ca_file,
            proxies=Proxies(
                https=settings.provider_https_proxy,
                http=settings.provider_http_proxy,
                no_proxy=settings.provider_no_proxy,
            ),
            policy=AddressPolicy.parse(
                settings.provider_allowed_networks, private=settings.provider_private_networks
            ),
        ),
    )


def _http_server(
    settings: Settings, running: Process, servicer: InferenceServicer, openai: OpenAIHandlers
) -> HttpServer:
    """Returns the server of OpenAI's API and of what streams tokens: here a token costs less."""
    generate = GrpcHttp1Handler(
        GENERATE_PATH,
        servicer.Generate,
        request_type=inference_pb2.GenerateRequest,
        clock=running.clock,
    )
    api = HttpApi(
        routes=openai.routes(),
        grpc_methods=[generate],
        is_ready=lambda: running.server.ready,
        clock=running.clock,
        dialect=OpenAIDialect(),
        longest_call_seconds=settings.longest_http_call_seconds,
    )
    return HttpServer(
        settings.http_listen_address,
        api,
        drain_seconds=settings.drain_seconds,
        clock=running.clock,
        tls=settings.tls,
        arrival_limits=settings.arrival_limits,
    )


if __name__ == "__main__":
    run(main())
