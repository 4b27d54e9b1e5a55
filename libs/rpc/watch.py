"""Watches snapshots of another service; each is used until the next valid one arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable
from typing import Generic, TypeVar

import grpc
import structlog
from prometheus_client import Counter, Gauge

from libs.clock import Clock

_log = structlog.get_logger()
_CONNECTED = Gauge(
    "headrace_watch_connected", "1 while the stream of snapshots is open, else 0.", ["dependency"]
)
_REJECTED = Counter(
    "headrace_watch_rejected_snapshots",
    "Snapshots that were rejected; the last valid one stays in use.",
    ["dependency"],
)

M = TypeVar("M")

FIRST_BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 1.0


class SnapshotWatch(Generic[M]):
    """Passes each message of a server stream to a callback, and reopens the stream when it ends.

    While the stream is down, or its snapshots are rejected, the last valid snapshot stays in use.
    """

    def __init__(
        self,
        dependency: str,
        *,
        open_stream: Callable[[], AsyncIterable[M]],
        on_snapshot: Callable[[M], None],
        clock: Clock,
    ) -> None:
        """Makes a watch; `run` starts it.

        Args:
            dependency: the service that sends the snapshots; a label of metrics.
            open_stream: starts the call.
            on_snapshot: uses a snapshot, or raises any error and changes nothing.
            clock: the time.
        """
        self._dependency = dependency
        self._open_stream = open_stream
        self._on_snapshot = on_snapshot
        self._clock = clock
        self._first = asyncio.Event()
        self._backoff_seconds = FIRST_BACKOFF_SECONDS
        self._connected = _CONNECTED.labels(dependency)
        self._rejected = _REJECTED.labels(dependency)

    async def run(self) -> None:
        """Watches until it is cancelled; errors are logged."""
        while True:
            try:
                await self._follow()
                _log.warning("watch ended", dependency=self._dependency)
            except grpc.aio.AioRpcError as error:
                _log.warning("watch broke", dependency=self._dependency, code=error.code().name)
            except Exception as error:  # noqa: BLE001  # also messages that cannot be parsed
                self._reject(error)
            self._connected.set(0)
            await self._clock.sleep(self._backoff_seconds)
            self._backoff_seconds = min(self._backoff_seconds * 2, MAX_BACKOFF_SECONDS)

    async def wait_first(self) -> None:
        """Waits for the first valid snapshot."""
        await self._first.wait()

    async def _follow(self) -> None:
        async for snapshot in self._open_stream():
            self._connected.set(1)
            try:
                self._on_snapshot(snapshot)
            except Exception as error:  # noqa: BLE001  # any invalid snapshot is skipped
                self._reject(error)
            else:
                self._first.set()
                self._backoff_seconds = FIRST_BACKOFF_SECONDS

    def _reject(self, error: Exception) -> None:
        self._rejected.inc()
        _log.error("snapshot rejected", dependency=self._dependency, exc_info=error)
