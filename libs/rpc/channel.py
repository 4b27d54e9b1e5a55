"""Channels to other services of the mesh."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc
from opentelemetry.instrumentation.grpc import aio_client_interceptors
from typing_extensions import override

MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_SERVICE_CONFIG = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                # gRPC retries only what has not been answered yet; a stream that has begun is not.
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


# gRPC sorts interceptors by the first of its classes that they have, so there are two.
class CancelledWithCaller(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]  # generic in stubs only
    """Cancels a unary RPC when the task that awaits it is cancelled. Must be the innermost.

    OpenTelemetry's interceptor awaits the status of a call, which leaves the call alone when it is
    cancelled: the callee would work on for nobody. To await the call itself ends it.
    """

    @override
    async def intercept_unary_unary(
        self,
        continuation: Callable[[grpc.aio.ClientCallDetails, Any], Awaitable[Any]],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        """Returns the call when it has ended, well or not."""
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
        """Returns the call when it has ended, well or not."""
        return await _ended(await continuation(client_call_details, request_iterator))


async def _ended(call: Any) -> Any:
    with suppress(grpc.aio.AioRpcError):  # the caller finds it in the call
        await call
    return call


def open_channel(address: str, *, traced: bool = True, retries: bool = True) -> grpc.aio.Channel:
    """Opens a channel; it connects when it is first used and again whenever it must.

    Args:
        address: `host:port`, or any name that gRPC resolves.
        traced: makes a client span of each call and carries the trace on.
        retries: lets gRPC retry `UNAVAILABLE`, three tries in all, within a budget.
    """
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.enable_retries", int(retries)),
        # A service that was restarted is found again at once, not after gRPC's two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        # Not a pause, in spite of its name: how long one try to connect may take. A peer that is
        # busy for a moment greets late.
        ("grpc.min_reconnect_backoff_ms", 5000),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        # A proxy of the environment (`https_proxy`) is for servers outside the mesh.
        ("grpc.enable_http_proxy", 0),
    ]
    if retries:
        options.append(("grpc.service_config", _SERVICE_CONFIG))
    traces = [*aio_client_interceptors(), CancelledWithCaller(), UploadCancelledWithCaller()]
    interceptors = traces if traced else None
    return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
