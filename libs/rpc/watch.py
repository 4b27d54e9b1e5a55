"""Snapshots that another service pushes: kept, and read again when the stream breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable
from typing import Generic, TypeVar

import grpc
import structlog
from prometheus_client import Gauge

from libs.clock import Clock

_log = structlog.get_logger()
_CONNECTED = Gauge(
    "headrace_watch_connected_count", "1 while the stream of snapshots is up.", ["dependency"]
)

M = TypeVar("M")

FIRST_BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 1.0


class SnapshotWatch(Generic[M]):
    """Keeps the newest message of a server stream, for as long as the process lives.

    While the stream is down the last snapshot stays: requests go on with what is known.
    """

    def __init__(
        self,
        dependency: str,
        *,
        open_stream: Callable[[], AsyncIterable[M]],
        on_snapshot: Callable[[M], None],
        clock: Clock,
    ) -> None:
        self._dependency = dependency
        self._open_stream = open_stream
        self._on_snapshot = on_snapshot
        self._clock = clock
        self._first = asyncio.Event()

    async def run(self) -> None:
        """Watches until it is cancelled."""
        backoff = FIRST_BACKOFF_SECONDS
        connected = _CONNECTED.labels(self._dependency)
        while True:
            try:
                async for snapshot in self._open_stream():
                    self._on_snapshot(snapshot)
                    self._first.set()
                    connected.set(1)
                    backoff = FIRST_BACKOFF_SECONDS
                _log.warning("watch ended", dependency=self._dependency)
            except grpc.aio.AioRpcError as error:
                _log.warning("watch broke", dependency=self._dependency, code=error.code().name)
            connected.set(0)
            await self._clock.sleep(backoff)
            backoff = min(backoff * 2, MAX_BACKOFF_SECONDS)

    async def wait_first(self) -> None:
        """Returns when there is a snapshot."""
        await self._first.wait()
