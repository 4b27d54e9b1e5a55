"""Channels to other services of the mesh."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc
from opentelemetry.instrumentation.grpc import aio_client_interceptors
from typing_extensions import override

from libs.addresses import unix_path
from libs.tls import MESH_NAME, TlsFiles

MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_SERVICE_CONFIG = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                # gRPC retries only calls without a response so far, so no stream that has started.
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "0.5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
        "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.2},
    }
)


# gRPC uses an interceptor only for the first of its base classes, so there are two.
class CancelledWithCaller(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]  # generic in stubs only
    """Cancels a unary RPC when the task that awaits it is cancelled. Must be the innermost.

    The interceptor of OpenTelemetry awaits the status of a call. Cancelling that does not
    cancel the call: the callee would continue. Awaiting the call itself cancels it.
    """

    @override
    async def intercept_unary_unary(
        self,
        continuation: Callable[[grpc.aio.ClientCallDetails, Any], Awaitable[Any]],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        """Returns the call when it has ended, with or without an error."""
        return await _ended(await continuation(client_call_details, request))


class UploadCancelledWithCaller(grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[type-arg]  # generic in stubs only
    """Does the same for calls that stream their requests."""

    @override
    async def intercept_stream_unary(
        self,
        continuation: Callable[[grpc.aio.ClientCallDetails, Any], Awaitable[Any]],
        client_call_details: grpc.aio.ClientCallDetails,
        request_iterator: Any,
    ) -> Any:
        """Returns the call when it has ended, with or without an error."""
        return await _ended(await continuation(client_call_details, request_iterator))


async def _ended(call: Any) -> Any:
    with suppress(grpc.aio.AioRpcError):  # the caller reads it from the call
        await call
    return call


def open_channel(
    address: str, *, tls: TlsFiles | None = None, traced: bool = True, retries: bool = True
) -> grpc.aio.Channel:
    """Opens a channel, which connects at the first call and reconnects when needed.

    Args:
        address: `host:port`, `unix:/path`, or any name that gRPC resolves.
        tls: the certificates of this process; used where the address is not a Unix socket.
        traced: makes a client span for each call and propagates the trace.
        retries: lets gRPC retry `UNAVAILABLE`, three tries in all, within a budget.
    """
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.enable_retries", int(retries)),
        # A restarted service is found immediately, not after the two minutes of gRPC.
        ("grpc.initial_reconnect_backoff_ms", 100),
        # In spite of its name this is the timeout of one connection attempt: a busy peer may
        # answer late.
        ("grpc.min_reconnect_backoff_ms", 5000),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        # Proxies of the environment (`https_proxy`) are for servers outside the mesh.
        ("grpc.enable_http_proxy", 0),
    ]
    if retries:
        options.append(("grpc.service_config", _SERVICE_CONFIG))
    traces = [*aio_client_interceptors(), CancelledWithCaller(), UploadCancelledWithCaller()]
    interceptors = traces if traced else None
    if tls is None or unix_path(address) is not None:
        return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    options.append(("grpc.ssl_target_name_override", MESH_NAME))
    return grpc.aio.secure_channel(
        address, channel_credentials(tls), options=options, interceptors=interceptors
    )


def channel_credentials(tls: TlsFiles) -> grpc.ChannelCredentials:
    """Returns what a channel shows and expects.

    Raises:
        OSError: a file cannot be read.
    """
    return grpc.ssl_channel_credentials(
        root_certificates=tls.ca.read_bytes(),
        private_key=tls.key.read_bytes(),
        certificate_chain=tls.certificate.read_bytes(),
    )
