"""Runs a real nats-server that asks for no credentials; acknowledged messages survive a kill."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

START_SECONDS = 15.0
STOP_SECONDS = 5.0

_BINARY = Path(sys.prefix, "bin", "nats-server")
_READY = b"Server is ready"
_CLIENTS = b"Listening for client connections on "


class NatsServer:
    """A nats-server that keeps its port when it is restarted.

    Attributes:
        url: URL for clients.
        system_credentials: file of the credentials of the system account.
    """

    def __init__(
        self, folder: Path, *, sync_always: bool = True, text: Callable[[int], str] | None = None
    ) -> None:
        self.url = ""
        self.system_credentials = folder.parent / f"{folder.name}.credentials"
        self._folder = folder
        self._sync_always = sync_always
        self._text = text or self._config
        self._port = -1
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts or restarts the server and waits until it is ready."""
        config = self._folder / "nats.conf"
        config.write_text(self._text(self._port))
        self.system_credentials.write_text("monitor:secret")
        self._process = await asyncio.create_subprocess_exec(
            _BINARY, "-c", str(config), stderr=asyncio.subprocess.PIPE
        )
        ready = asyncio.Event()
        self._reading = asyncio.create_task(self._read(self._process, ready))
        async with asyncio.timeout(START_SECONDS):
            await ready.wait()
        self.url = f"nats://127.0.0.1:{self._port}"

    def use_folder(self, folder: Path) -> None:
        """Sets the folder of the store, from the next start."""
        self._folder = folder

    async def kill(self) -> None:
        """Kills the server with SIGKILL."""
        assert self._process is not None
        self._process.kill()
        await self._ended()

    async def stop(self) -> None:
        """Stops the server cleanly."""
        if self._process is None or self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._ended()
        except TimeoutError:
            await self.kill()

    async def _ended(self) -> None:
        assert self._process is not None
        assert self._reading is not None
        await self._process.wait()
        await self._reading

    def _config(self, port: int) -> str:
        sync = "sync_interval: always" if self._sync_always else ""
        return f"""
            listen: 127.0.0.1:{port}
            authorization {{ users: [ {{user: anyone, password: unused}} ] }}
            accounts {{ $SYS {{ users: [ {{user: monitor, password: secret}} ] }} }}
            no_auth_user: anyone
            max_payload: 8MB
            jetstream {{ store_dir: {self._folder}, {sync} }}
        """

    async def _read(self, process: asyncio.subprocess.Process, ready: asyncio.Event) -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            if _CLIENTS in line:
                self._port = int(line.rpartition(b":")[2])
            elif _READY in line:
                ready.set()


@asynccontextmanager
async def running_nats(
    folder: Path, *, sync_always: bool = True, text: Callable[[int], str] | None = None
) -> AsyncIterator[NatsServer]:
    """Runs a server with its store in `folder`; `text` makes another configuration for a port."""
    server = NatsServer(folder, sync_always=sync_always, text=text)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
