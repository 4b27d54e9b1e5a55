"""Starts a complete mesh like `headrace up`, with the bundled models."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
import pytest

from deploy.host import LOOPBACK
from deploy.keys import mint_token
from deploy.local.layout import Layout
from deploy.local.lifecycle import deploy_models, start, stop
from deploy.local.ports import EDGE, address, read_ports
from deploy.local.processes import ProcessSpec
from deploy.local.readiness import Probe
from deploy.local.supervisor import process_states
from tests.support.otlp import CollectedSpan, Collector, running_collector

# The providers of tests run on this machine.
LOOPBACK_NETWORK = "127.0.0.0/8"
_POLL_SECONDS = 0.05


class SilentProgress:
    """Ignores the progress of a start."""

    def starting(self, names: list[str]) -> None:
        pass

    def step(self, model: str, text: str) -> None:
        pass

    def ready(self, name: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class RunningMesh:
    """A running mesh."""

    layout: Layout
    processes: list[ProcessSpec]

    @property
    def address(self) -> str:
        """The edge's `host:port`."""
        return address(read_ports(self.layout), EDGE)

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def token(self, **claims: Any) -> str:
        """Signs a token; tenant `acme` and user `ann` by default."""
        return mint_token(self.layout.home, **{"tenant": "acme", "user": "ann", **claims})

    def metadata(self, **claims: Any) -> tuple[tuple[str, str], ...]:
        """Returns the authorization metadata with a token."""
        return (("authorization", f"Bearer {self.token(**claims)}"),)

    def channel(self) -> grpc.aio.Channel:
        """Opens a channel to the edge; use it in a `with` statement or close it."""
        return grpc.aio.insecure_channel(self.address)

    def pid(self, name: str) -> int:
        """Returns the current process ID of a process."""
        return process_states(self.layout)[name].pid

    def kill(self, name: str) -> None:
        """Kills a process with SIGKILL."""
        os.kill(self.pid(name), signal.SIGKILL)

    def await_ready(self, name: str, *, seconds: float) -> None:
        """Waits until a process reports that it is ready."""
        (process,) = [process for process in self.processes if process.name == name]
        deadline = time.monotonic() + seconds
        with Probe(self.layout, process) as probe:
            while not probe.is_ready():
                assert time.monotonic() < deadline, f"{name} is not ready after {seconds} s"
                time.sleep(_POLL_SECONDS)


class CollectorThread:
    """A collector in its own thread, independent of the event loops of single tests."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._running = running_collector()
        self._collector: Collector | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        self._collector = self._await(self._running.__aenter__())
        return self

    def __exit__(self, *error: object) -> None:
        self._await(self._running.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def endpoint(self) -> str:
        assert self._collector is not None
        return self._collector.endpoint

    async def wait_for(self, wanted: Callable[[list[CollectedSpan]], bool]) -> list[CollectedSpan]:
        """Waits until the spans meet the condition, and returns them."""
        assert self._collector is not None
        waiting = asyncio.run_coroutine_threadsafe(self._collector.wait_for(wanted), self._loop)
        return await asyncio.wrap_future(waiting)

    def _await(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)


@contextmanager
def running_mesh(home: Path, *, models: bool, **shape: Any) -> Iterator[RunningMesh]:
    """Starts a mesh on free ports and stops it at the end.

    Args:
        home: an empty folder.
        models: whether to deploy the bundled models.
        shape: `inference_replicas`, `triton_backends`, `transport`, `edge`.
    """
    layout = Layout(home=home, edge_port=free_port(), **shape)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HEADRACE_PROVIDER_ALLOWED_NETWORKS", LOOPBACK_NETWORK)
        try:
            processes = start(layout, SilentProgress())
            if models:
                deploy_models(layout, SilentProgress())
            yield RunningMesh(layout=layout, processes=processes)
        finally:
            stop(layout)


def free_port() -> int:
    """Returns a port that is free at this moment."""
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="session")
def collector() -> Iterator[CollectorThread]:
    """Collects the traces of the session's mesh."""
    with CollectorThread() as collector:
        yield collector


@pytest.fixture(scope="session")
def mesh(
    tmp_path_factory: pytest.TempPathFactory, collector: CollectorThread
) -> Iterator[RunningMesh]:
    """The session's mesh, for tests that do not change it."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        environment.setenv("HEADRACE_LOG_LEVEL", "debug")
        with running_mesh(tmp_path_factory.mktemp("mesh"), models=True) as mesh:
            yield mesh
