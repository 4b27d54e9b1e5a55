"""Channels to other services of the mesh."""

from __future__ import annotations

import json

import grpc
from opentelemetry.instrumentation.grpc import aio_client_interceptors

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
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 5_000),
    ]
    if retries:
        options.append(("grpc.service_config", _SERVICE_CONFIG))
    interceptors = aio_client_interceptors() if traced else None
    return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
