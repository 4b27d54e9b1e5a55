"""Runs a service process: telemetry, server, background tasks, graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import structlog
import uvloop
from prometheus_client import Gauge

from libs.background import start_task
from libs.clock import Clock, SystemClock
from libs.config import ServiceSettings
from libs.rpc.server import MAX_RECEIVED_BYTES, RpcServer
from libs.telemetry.logs import log_loop_error, setup_logging
from libs.telemetry.metrics import serve_metrics
from libs.telemetry.tracing import setup_tracing

if TYPE_CHECKING:  # most processes have no HTTP server, and save its memory
    from libs.http1 import HttpServer

_TASKS = Gauge("headrace_process_tasks", "Asyncio tasks that are not done.")

_log = structlog.get_logger()


class Process:
    """One service process, from start to shutdown. Made by `process()`."""

    def __init__(
        self, name: str, settings: ServiceSettings, clock: Clock, *, max_message_bytes: int
    ) -> None:
        self.name = name
        self.clock = clock
        self.server = RpcServer(
            settings.listen_address,
            clock=clock,
            reuse_port=False,
            tls=settings.tls,
            max_message_bytes=max_message_bytes,
        )
        self._servers = [self.server]
        self._settings = settings
        self._drain_seconds = settings.drain_seconds
        self._main = asyncio.current_task()
        self._serving = False
        self._closing = False
        self._stop = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self._on_drain: list[Callable[[], None]] = []

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs work in the background. If it fails, the process exits, to be restarted.

        The process also exits if the work is cancelled by anything but the shutdown.
        """
        task = start_task(work, name=getattr(work, "__qualname__", "background"))
        self._background.add(task)
        task.add_done_callback(self._on_done)
        return task

    def add_server(self, address: str, *, max_message_bytes: int) -> RpcServer:
        """Returns a further gRPC server, which is started, ready and stopped with the first one.

        Args:
            address: where it listens.
            max_message_bytes: the longest message that it receives.
        """
        server = RpcServer(
            address,
            clock=self.clock,
            tls=self._settings.tls,
            max_message_bytes=max_message_bytes,
        )
        self._servers.append(server)
        return server

    async def set_ready(self) -> None:
        """Makes health checks report SERVING."""
        for server in self._servers:
            await server.set_ready(True)

    def on_drain(self, call: Callable[[], None]) -> None:
        """Registers a function that is called when shutdown starts, to end watches and the like."""
        self._on_drain.append(call)

    async def serve(self, *, ready: bool = True, http: HttpServer | None = None) -> None:
        """Serves until SIGTERM or SIGINT, then drains; also with an HTTP server, if given."""
        self._serving = True
        for server in self._servers:
            await server.start(ready=ready)
            self.spawn(server.ended())
        if http is not None:
            await http.start()
        gc.collect()
        gc.freeze()  # objects that exist now are permanent, so the garbage collector can skip them
        _log.info("serving", address=self.server.address)
        await self._stop.wait()
        _log.info("draining", drain_seconds=self._drain_seconds)
        for call in self._on_drain:
            call()
        ends = [server.stop(self._drain_seconds) for server in self._servers]
        if http is not None:
            ends.append(http.stop())
        await asyncio.gather(*ends)

    def stop(self) -> None:
        """Starts the shutdown. If the process is still starting, that is cancelled."""
        self._stop.set()
        if not self._serving and self._main is not None:
            self._main.cancel()

    async def close(self) -> None:
        """Cancels the background work."""
        self._closing = True
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if task.cancelled():
            if self._closing:
                return
            _log.error("background task was cancelled", task=task.get_name())
        elif task.exception() is None:
            return
        self.stop()


@asynccontextmanager
async def process(
    name: str, settings: ServiceSettings, *, max_message_bytes: int = MAX_RECEIVED_BYTES
) -> AsyncIterator[Process]:
    """Sets up logs, traces and metrics of a process, and shuts them down at the end.

    Args:
        name: of the service.
        settings: its settings.
        max_message_bytes: the longest message that its gRPC server receives.
    """
    setup_logging(service=name, level=settings.log_level)
    tracing = setup_tracing(
        service=name,
        sample_percent=settings.trace_sample_percent,
        otlp_endpoint=settings.otlp_endpoint,
    )
    metrics = serve_metrics(settings.metrics_address)
    running = Process(name, settings, SystemClock(), max_message_bytes=max_message_bytes)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(log_loop_error)
    _TASKS.set_function(lambda: len(asyncio.all_tasks(loop)))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.stop)
    try:
        yield running
    finally:
        await running.close()
        metrics.close()
        tracing.shutdown()


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs a process's `main` on uvloop."""
    with contextlib.suppress(asyncio.CancelledError):  # ended before it served
        uvloop.run(main)
