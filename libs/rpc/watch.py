"""Snapshots that another service pushes: each stays in force until a newer good one comes."""

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
    "Snapshots that were not accepted; the one before stays in force.",
    ["dependency"],
)

M = TypeVar("M")

FIRST_BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 1.0


class SnapshotWatch(Generic[M]):
    """Passes on each message of a server stream, and opens the stream again when it ends.

    While the stream is down, or sends what `on_snapshot` rejects, the last good snapshot stays in
    force: requests are answered with what is known.
    """

    def __init__(
        self,
        dependency: str,
        *,
        open_stream: Callable[[], AsyncIterable[M]],
        on_snapshot: Callable[[M], None],
        clock: Clock,
    ) -> None:
        """Prepares; `run` watches.

        Args:
            dependency: the service that sends the snapshots; a label of metrics.
            open_stream: calls it.
            on_snapshot: puts a snapshot into force, or raises any error and changes nothing.
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
        """Watches until it is cancelled; no error ends it."""
        while True:
            try:
                await self._follow()
                _log.warning("watch ended", dependency=self._dependency)
            except grpc.aio.AioRpcError as error:
                _log.warning("watch broke", dependency=self._dependency, code=error.code().name)
            except Exception as error:  # noqa: BLE001  # among others, bytes that are no message
                self._reject(error)
            self._connected.set(0)
            await self._clock.sleep(self._backoff_seconds)
            self._backoff_seconds = min(self._backoff_seconds * 2, MAX_BACKOFF_SECONDS)

    async def wait_first(self) -> None:
        """Returns when the first snapshot is in force."""
        await self._first.wait()

    async def _follow(self) -> None:
        async for snapshot in self._open_stream():
            self._connected.set(1)
            try:
                self._on_snapshot(snapshot)
            except Exception as error:  # noqa: BLE001  # whatever is wrong with it, go on without
                self._reject(error)
            else:
                self._first.set()
                self._backoff_seconds = FIRST_BACKOFF_SECONDS

    def _reject(self, error: Exception) -> None:
        self._rejected.inc()
        _log.error("snapshot rejected", dependency=self._dependency, exc_info=error)
