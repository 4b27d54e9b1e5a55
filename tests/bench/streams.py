"""Many gRPC streams from one client; messages stay bytes, so that the client costs little."""

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
class Streamed:
    """What a run saw."""

    tokens: int = 0
    seconds: float = 0.0
    first_seconds: list[float] = field(default_factory=list)

    @property
    def first_ms(self) -> float:
        """The median time to the first token."""
        return 1000 * statistics.median(self.first_seconds)

    @property
    def tokens_per_second(self) -> float:
        """The rate of all streams together, first tokens included."""
        return self.tokens / self.seconds


async def stream(
    *,
    address: str,
    method: str,
    requests: list[bytes],
    count: Callable[[bytes], int],
    metadata: Metadata = (),
) -> Streamed:
    """Sends all requests at once and reads their answers to the end.

    Args:
        address: `host:port`.
        method: `/package.Service/Method`, unary in, a stream out.
        requests: serialised.
        count: how many tokens a message has.
        metadata: of each call.
    """
    found = Streamed()
    async with grpc.aio.insecure_channel(address) as channel:
        call: Any = channel.unary_stream(method, None, None)  # bytes as they are
        await channel.channel_ready()

        async def one(request: bytes) -> None:
            began = time.perf_counter()
            first = 0.0
            messages = call(request, metadata=metadata)
            while message := await messages.read():
                tokens = count(message)
                if tokens and not first:
                    first = time.perf_counter() - began
                found.tokens += tokens
            assert await messages.code() == grpc.StatusCode.OK
            found.first_seconds.append(first)

        await one(requests[0])  # what is made for the first call is not what is measured
        found.first_seconds.clear()
        found.tokens = 0
        began = time.perf_counter()
        await asyncio.gather(*(one(request) for request in requests))
        found.seconds = time.perf_counter() - began
    return found
