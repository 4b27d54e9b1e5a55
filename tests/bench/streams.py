"""Reads many gRPC streams at once; messages stay bytes, so that the client costs little."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

Metadata = tuple[tuple[str, str], ...]


@dataclass
class StreamsResult:
    """What a run measured."""

    tokens: int = 0
    seconds: float = 0.0
    first_seconds: list[float] = field(default_factory=list)

    @property
    def first_ms(self) -> float:
        """Median time to the first token."""
        return 1000 * statistics.median(self.first_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Rate of all streams together, including first tokens."""
        return self.tokens / self.seconds


async def stream(
    *,
    address: str,
    method: str,
    requests: list[bytes],
    count: Callable[[bytes], int],
    metadata: Metadata = (),
) -> StreamsResult:
    """Sends all requests at once and reads the streams to their ends.

    Args:
        address: `host:port`.
        method: `/package.Service/Method`, with one request and a stream of responses.
        requests: serialised requests.
        count: returns the number of tokens in a message.
        metadata: metadata of each call.
    """
    result = StreamsResult()
    async with grpc.aio.insecure_channel(address) as channel:
        call: Any = channel.unary_stream(method, None, None)  # no deserialisation
        await channel.channel_ready()

        async def one(request: bytes) -> None:
            started = time.perf_counter()
            first = 0.0
            messages = call(request, metadata=metadata)
            while message := await messages.read():
                tokens = count(message)
                if tokens and not first:
                    first = time.perf_counter() - started
                result.tokens += tokens
            assert await messages.code() == grpc.StatusCode.OK
            result.first_seconds.append(first)

        await one(requests[0])  # excludes the connection set-up
        result.first_seconds.clear()
        result.tokens = 0
        started = time.perf_counter()
        await asyncio.gather(*(one(request) for request in requests))
        result.seconds = time.perf_counter() - started
    return result
