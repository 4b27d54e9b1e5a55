"""A gRPC server with health, reflection and graceful shutdown."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer
from headrace.cost.v1 import cost_pb2
from headrace.embedding.v1 import embedding_pb2
from headrace.events.v1 import events_pb2
from headrace.inference.v1 import inference_pb2
from headrace.jobs.v1 import jobs_pb2
from headrace.openai.v1 import openai_pb2
from headrace.registry.v1 import registry_pb2
from headrace.router.v1 import router_pb2

from libs.clock import Clock
from libs.rpc.channel import MAX_MESSAGE_BYTES
from libs.rpc.interceptors import ServedCalls

_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"


class RpcServer:
    """One process's server.

    Register servicers on `grpc`, then `start()`. Health is NOT_SERVING until `set_ready(True)`.

    Attributes:
        ready: whether health says that calls should come here.
    """

    def __init__(self, address: str, *, clock: Clock, reuse_port: bool = False) -> None:
        self.address = address
        self.grpc = grpc.aio.server(
            interceptors=[ServedCalls(clock)],
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", int(reuse_port)),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ],
        )
        self.ready = False
        self._health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)

    async def start(self, *, ready: bool = True) -> None:
        """Binds and serves.

        Raises:
            RuntimeError: the address cannot be bound.
        """
        reflect(self.grpc)
        port = self.grpc.add_insecure_port(self.address)
        self.address = f"{self.address.rpartition(':')[0]}:{port}"
        await self.set_ready(ready)
        await self.grpc.start()

    async def set_ready(self, ready: bool) -> None:
        """Tells health checkers whether calls should come here."""
        self.ready = ready
        status = health_pb2.HealthCheckResponse.ServingStatus
        await self._health.set("", status.SERVING if ready else status.NOT_SERVING)

    async def stop(self, drain_seconds: float) -> None:
        """Turns new calls away, lets running ones end for so long, then cancels them."""
        self.ready = False
        await self._health.enter_graceful_shutdown()
        await self.grpc.stop(drain_seconds)


def reflect(server: grpc.aio.Server) -> None:
    """Answers reflection, v1 and v1alpha, for every service of the mesh.

    Each process knows all protos, so that the edge can ask any of them.
    """
    names = _all_service_names()
    reflection.enable_server_reflection(names, server)
    # v1 has the messages of v1alpha under another package name.
    servicer = ReflectionServicer(names)
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                _REFLECTION_V1,
                {
                    "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(
                        servicer.ServerReflectionInfo,
                        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
                        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
                    )
                },
            ),
        )
    )


def _all_service_names() -> list[str]:
    modules = [
        cost_pb2, embedding_pb2, events_pb2, inference_pb2,
        jobs_pb2, openai_pb2, registry_pb2, router_pb2,
    ]  # fmt: skip
    names = [
        service.full_name
        for module in modules
        for service in module.DESCRIPTOR.services_by_name.values()
    ]
    return [*names, health.SERVICE_NAME, reflection.SERVICE_NAME, _REFLECTION_V1]
