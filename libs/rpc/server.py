"""A gRPC server with health, reflection and graceful shutdown."""

from __future__ import annotations

from collections.abc import Callable

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

from libs.addresses import unix_path
from libs.clock import Clock
from libs.rpc.access import required_scope
from libs.rpc.channel import MAX_MESSAGE_BYTES
from libs.rpc.interceptors import ServedCalls
from libs.rpc.public_api import PUBLIC_FILES, public_services, with_dependencies
from libs.tls import TlsFiles

_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"


class RpcServer:
    """One process's server.

    Register servicers on `grpc`, then `start()`. On TCP, with `tls`, it accepts clients with a
    certificate of the mesh only. Health is NOT_SERVING until `set_ready(True)`.

    Attributes:
        address: `host:port`, after `start()` with the port that was bound, or `unix:/path`.
        ready: whether health checks report SERVING.
    """

    def __init__(
        self,
        address: str,
        *,
        clock: Clock,
        reuse_port: bool = False,
        tls: TlsFiles | None = None,
        scope_of: Callable[[str], str] = required_scope,
    ) -> None:
        self.address = address
        self._tls = None if unix_path(address) is not None else tls
        self.grpc = grpc.aio.server(
            interceptors=[ServedCalls(clock, scope_of)],
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                # gRPC decompresses before anybody sees the call: 64 KiB become 64 MiB, also
                # without a token. Only the first algorithm, identity, is left.
                ("grpc.compression_enabled_algorithms_bitset", 1),
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
            OSError: a file of TLS cannot be read.
        """
        reflect(self.grpc)
        if self._tls is None:
            port = self.grpc.add_insecure_port(self.address)
        else:
            port = self.grpc.add_secure_port(self.address, _credentials(self._tls))
        if unix_path(self.address) is None:
            self.address = f"{self.address.rpartition(':')[0]}:{port}"
        await self.set_ready(ready)
        await self.grpc.start()

    async def set_ready(self, ready: bool) -> None:
        """Sets what health checks report."""
        self.ready = ready
        status = health_pb2.HealthCheckResponse.ServingStatus
        await self._health.set("", status.SERVING if ready else status.NOT_SERVING)

    async def stop(self, drain_seconds: float) -> None:
        """Refuses new calls, waits for running ones, then cancels them."""
        self.ready = False
        await self._health.enter_graceful_shutdown()
        await self.grpc.stop(drain_seconds)


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials(
        [(tls.key.read_bytes(), tls.certificate.read_bytes())],
        root_certificates=tls.ca.read_bytes(),
        require_client_auth=True,
    )


def reflect(server: grpc.aio.Server) -> None:
    """Answers reflection, v1 and v1alpha, for every public service of the mesh.

    Each process knows all public protos, so that the edge can ask any of them. Internal protos are
    not in the pool: they are neither listed nor found by name.
    """
    names = [
        *(service.full_name for service in public_services()),
        health.SERVICE_NAME, reflection.SERVICE_NAME, _REFLECTION_V1,
    ]  # fmt: skip
    pool = _public_pool()
    reflection.enable_server_reflection(names, server, pool=pool)
    # v1 has the messages of v1alpha under another package name.
    servicer = ReflectionServicer(names, pool=pool)
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


def _public_pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    files = (*PUBLIC_FILES, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
    for proto in with_dependencies(files):
        pool.Add(proto)
    return pool
