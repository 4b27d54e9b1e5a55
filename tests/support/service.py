"""Runs a service as its own process, like the supervisor."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

START_SECONDS = 30.0
STOP_SECONDS = 15.0
_POLL_SECONDS = 0.02


class RunningService:
    """A process that serves gRPC; restarts keep its address.

    Attributes:
        address: address of its gRPC server, set by `start`.
        log: what it wrote.
    """

    def __init__(
        self, name: str, home: Path, env: Mapping[str, str], preexec: Callable[[], None] | None
    ) -> None:
        self.name = name
        self.log = home / f"{name}.log"
        self.address = "127.0.0.1:0"
        self._home = home
        self._env = env
        self._preexec = preexec
        self._process: asyncio.subprocess.Process | None = None

    @property
    def process(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise AssertionError(f"{self.name} was not started")
        return self._process

    async def start(self) -> None:
        """Starts the process and waits until its server listens, ready or not."""
        key = self._home / "input-hash.key"
        key.write_bytes(b"k" * 32)
        begin = self.log.stat().st_size if self.log.exists() else 0
        env = {
            "PATH": os.environ["PATH"],
            "HEADRACE_HOME": str(self._home),
            "HEADRACE_LISTEN_ADDRESS": self.address,
            "HEADRACE_METRICS_ADDRESS": "127.0.0.1:0",
            "HEADRACE_PLAINTEXT": "true",
            "HEADRACE_INPUT_HASH_KEY_FILE": str(key),
            **self._env,
        }
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", f"services.{self.name}",
                env=env, stdout=log, stderr=log, preexec_fn=self._preexec,
            )  # fmt: skip
        async with asyncio.timeout(START_SECONDS):
            while not (serving := self._events("serving", begin)):
                if self.process.returncode is not None:
                    raise AssertionError(f"{self.name} ended: {self.log.read_text()[-4000:]}")
                await asyncio.sleep(_POLL_SECONDS)
        self.address = serving[0]["address"]

    async def kill(self) -> None:
        """Kills the process with SIGKILL."""
        self.process.kill()
        await self.process.wait()

    async def terminate(self) -> int:
        """Stops the process like the supervisor; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOP_SECONDS):
            return await self.process.wait()

    async def health(self) -> str:
        """Returns the status of its health check."""
        async with self.channel() as channel:
            checked = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=5
            )
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(checked.status))

    async def healthy(self) -> None:
        """Waits until the service is ready."""
        async with asyncio.timeout(START_SECONDS), self.channel() as channel:
            states = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            async for state in states:
                if state.status == health_pb2.HealthCheckResponse.SERVING:
                    return

    def channel(self) -> grpc.aio.Channel:
        """Opens a channel that shares no connections and no back-off with other channels."""
        return grpc.aio.insecure_channel(
            self.address,
            options=[
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 5000),
                ("grpc.max_reconnect_backoff_ms", 200),
            ],
        )

    def _events(self, event: str, begin: int) -> list[dict[str, Any]]:
        lines = self.log.read_bytes()[begin:].splitlines()
        parsed = [
            json.loads(line) for line in lines if line.startswith(b"{") and line.endswith(b"}")
        ]
        return [line for line in parsed if line.get("event") == event]


@asynccontextmanager
async def running_service(
    name: str,
    home: Path,
    *,
    preexec: Callable[[], None] | None = None,
    **env: str,
) -> AsyncIterator[RunningService]:
    """Runs `services.<name>` with its own home; kills the process at the end.

    Args:
        name: the service.
        home: an empty folder.
        preexec: called in the process before the service starts, to set limits.
        **env: settings, as environment variables.
    """
    service = RunningService(name, home, env, preexec)
    await service.start()
    try:
        yield service
    finally:
        if service.process.returncode is None:
            await service.kill()
