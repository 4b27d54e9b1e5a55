"""A gRPC server with health, reflection and graceful shutdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from typing_extensions import override

from libs.addresses import unix_path
from libs.clock import Clock
from libs.errors import NotFound
from libs.rpc.access import required_scope
from libs.rpc.channel import MAX_MESSAGE_BYTES
from libs.rpc.interceptors import ServedCalls
from libs.rpc.reflection import reflect
from libs.rpc.served_call import MAX_REQUEST_BYTES
from libs.tls import TlsFiles

# More than a request may have, so that the error of one that is too long can carry `ErrorInfo`.
MAX_RECEIVED_BYTES = 2 * MAX_REQUEST_BYTES
# How often to check whether gRPC itself has ended the server: only a wait that times out shows it.
_WAIT_SECONDS = 1.0


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
        max_message_bytes: int = MAX_RECEIVED_BYTES,
        scope_of: Callable[[str], str] = required_scope,
    ) -> None:
        """Creates a server.

        Args:
            address: where it listens.
            clock: the time.
            reuse_port: whether several processes may share a TCP port.
            tls: the files of TLS, for TCP.
            max_message_bytes: the longest message that gRPC receives, of any method: it is in
                memory before the call is looked at.
            scope_of: returns the scope that a method's path requires.
        """
        self.address = address
        self._tls = None if unix_path(address) is not None else tls
        self.grpc = grpc.aio.server(
            interceptors=[ServedCalls(clock, scope_of)],
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                # gRPC decompresses before any handler sees the call: 64 KiB become 64 MiB, also
                # without a token. Only the first algorithm, identity, is left.
                ("grpc.compression_enabled_algorithms_bitset", 1),
                # What a handler does not read is not received: else the window of each stream grows
                # until an unread message of 60 MiB is in memory.
                ("grpc.http2.bdp_probe", 0),
                ("grpc.so_reuseport", int(reuse_port)),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ],
        )
        self.ready = False
        self._health = _Health()
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

    async def ended(self) -> None:
        """Waits until the server has stopped.

        Raises:
            Exception: gRPC itself ended it, and nothing is served any more: `grpc.aio` does so for
                a path that is not UTF-8, which the edge never forwards.
        """
        while await self.grpc.wait_for_termination(timeout=_WAIT_SECONDS):
            pass

    async def stop(self, drain_seconds: float) -> None:
        """Refuses new calls, waits for running ones, then cancels them."""
        self.ready = False
        await self._health.enter_graceful_shutdown()
        await self.grpc.stop(drain_seconds)


class _Health(HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """Health of the process, under the empty name."""

    @override
    async def Check(self, request: Any, context: Any) -> Any:
        """Returns whether the process is ready.

        Raises:
            NotFound: the name is not empty. The library itself would give no reason.
        """
        if request.service:
            raise NotFound.of_resource(request.service)
        return await super().Check(request, context)


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials(
        [(tls.key.read_bytes(), tls.certificate.read_bytes())],
        root_certificates=tls.ca.read_bytes(),
        require_client_auth=True,
    )
