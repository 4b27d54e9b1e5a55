"""An HTTP proxy: opens tunnels (`CONNECT`) and forwards requests with an absolute URL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

# Only the proxy resolves names in this domain; all are the loopback interface.
DOMAIN = ".behind-proxy.test"


class ForwardProxy:
    """Connects clients to test servers.

    Attributes:
        url: its URL.
        heads: heads of the received requests.
        reply: takes the head of a request; returns a response, or None to connect it.
    """

    def __init__(self) -> None:
        self.url = ""
        self.heads: list[str] = []
        self.reply: Callable[[str], bytes | None] = lambda _head: None
        self._tasks: set[asyncio.Task[None]] = set()

    async def accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._serve(reader, writer)
        finally:
            writer.transport.abort()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        self.heads.append(head)
        if (reply := self.reply(head)) is not None:
            writer.write(reply)
            await writer.drain()
            await reader.read()
            return
        method, target, _ = head.split("\r\n")[0].split(" ")
        parts = urlsplit(f"//{target}" if method == "CONNECT" else target)
        assert parts.hostname is not None
        assert parts.hostname.endswith(DOMAIN)
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", parts.port)
        try:
            if method == "CONNECT":
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                path = f"{parts.path}?{parts.query}"
                server_writer.write(head.replace(target, path, 1).encode("latin-1"))
            await asyncio.gather(_copy(reader, server_writer), _copy(server_reader, writer))
        finally:
            server_writer.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.transport.abort()


@asynccontextmanager
async def running_proxy() -> AsyncIterator[ForwardProxy]:
    """Runs a proxy on the loopback interface."""
    proxy = ForwardProxy()
    server = await asyncio.start_server(proxy.accepted, "127.0.0.1", 0)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
