"""The backends in reach and which of them a request takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from headrace.common.v1 import model_pb2

from libs.rpc.channel import open_channel
from services.inference.triton import Triton


@dataclass(frozen=True)
class Lease:
    """A backend that was picked for one attempt."""

    backend: model_pb2.Backend
    triton: Triton


class Backends:
    """Channels to every backend that a route ever named, and how many requests each has."""

    def __init__(self) -> None:
        self._channels: dict[str, tuple[grpc.aio.Channel, Triton]] = {}
        self._in_flight: Counter[str] = Counter()

    @contextmanager
    def lease(
        self, candidates: Sequence[model_pb2.Backend], *, avoid: frozenset[str] = frozenset()
    ) -> Iterator[Lease]:
        """Picks the backend with the fewest requests of ours; those to avoid come last.

        Args:
            candidates: at least one.
            avoid: ids of backends that failed this request before.
        """
        best = min(
            candidates, key=lambda backend: (backend.id in avoid, self._in_flight[backend.address])
        )
        self._in_flight[best.address] += 1
        try:
            yield Lease(best, self._triton(best.address))
        finally:
            self._in_flight[best.address] -= 1

    def _triton(self, address: str) -> Triton:
        if address not in self._channels:
            # Untraced and without gRPC's retries: attempts are ours, with spans of their own.
            channel = open_channel(address, traced=False, retries=False)
            self._channels[address] = (channel, Triton(channel))
        return self._channels[address][1]

    async def close(self) -> None:
        """Closes all channels."""
        for channel, _ in self._channels.values():
            await channel.close(None)
