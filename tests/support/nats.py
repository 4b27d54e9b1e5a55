"""A real nats-server that keeps what it acknowledged, also when it is killed."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

START_SECONDS = 15.0
STOP_SECONDS = 5.0

_BINARY = Path(sys.prefix, "bin", "nats-server")
_READY = b"Server is ready"
_CLIENTS = b"Listening for client connections on "
_MONITOR = b"Starting http monitor on "


class NatsServer:
    """One nats-server; its port is free at first and stays the same from then on.

    Attributes:
        url: where clients connect.
        monitoring_url: where `/varz` is.
    """

    def __init__(self, folder: Path, *, sync_always: bool = True) -> None:
        self.url = self.monitoring_url = ""
        self._folder = folder
        self._sync_always = sync_always
        self._port = self._monitoring_port = -1
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts it, again if need be, and waits until it says that it is ready."""
        config = self._folder / "nats.conf"
        config.write_text(self._config())
        self._process = await asyncio.create_subprocess_exec(
            _BINARY, "-c", str(config), stderr=asyncio.subprocess.PIPE
        )
        ready = asyncio.Event()
        self._reading = asyncio.create_task(self._read(self._process, ready))
        async with asyncio.timeout(START_SECONDS):
            await ready.wait()
        self.url = f"nats://127.0.0.1:{self._port}"
        self.monitoring_url = f"http://127.0.0.1:{self._monitoring_port}"

    def use_folder(self, folder: Path) -> None:
        """Has another store from the next start on."""
        self._folder = folder

    async def kill(self) -> None:
        """Ends it as a crash would: nothing is written, nobody is told."""
        assert self._process is not None
        self._process.kill()
        await self._gone()

    async def stop(self) -> None:
        """Ends it in good order."""
        if self._process is None or self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._gone()
        except TimeoutError:
            await self.kill()

    async def _gone(self) -> None:
        assert self._process is not None
        assert self._reading is not None
        await self._process.wait()
        await self._reading

    def _config(self) -> str:
        sync = "sync_interval: always" if self._sync_always else ""
        return f"""
            listen: 127.0.0.1:{self._port}
            http: 127.0.0.1:{self._monitoring_port}
            max_payload: 8MB
            jetstream {{ store_dir: {self._folder}, {sync} }}
        """

    async def _read(self, process: asyncio.subprocess.Process, ready: asyncio.Event) -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            if _CLIENTS in line:
                self._port = int(line.rpartition(b":")[2])
            elif _MONITOR in line:
                self._monitoring_port = int(line.rpartition(b":")[2])
            elif _READY in line:
                ready.set()


@asynccontextmanager
async def running_nats(folder: Path, *, sync_always: bool = True) -> AsyncIterator[NatsServer]:
    """Runs a server with its store in a folder."""
    server = NatsServer(folder, sync_always=sync_always)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
