"""An HTTP/1.1 server that a test controls byte by byte; it can also send invalid responses."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from libs.http_client import HttpClient, Network, Response

# Longer than any test waits on a slow machine.
PATIENCE_SECONDS = 20.0
# More than the buffers of the kernel and both event loops.
FOREVER_BYTES = 16 * 1024 * 1024

Script = Callable[["Peer"], Awaitable[None]]


class Peer:
    """The server side of one connection.

    Attributes:
        number: number of the connection, from 0.
        head: the head of the request that was read last.
    """

    def __init__(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.number = number
        self.head = b""
        self.writer = writer
        self._reader = reader

    async def request(self) -> bytes:
        """Returns the body of the next request.

        Raises:
            IncompleteReadError: the client closed the connection.
        """
        self.head = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", self.head)
        assert length is not None
        return await self._reader.readexactly(int(length[1]))

    async def head_of_request(self) -> None:
        """Reads the head of a request, not its body."""
        self.head = await self._reader.readuntil(b"\r\n\r\n")

    def send(self, *parts: bytes) -> None:
        """Sends bytes in one write."""
        self.writer.write(b"".join(parts))

    def hang_up(self) -> None:
        """Closes the sending side of the socket, without a `close_notify` of TLS."""
        held = self.writer.get_extra_info("socket")
        with socket.socket(fileno=os.dup(held.fileno())) as same:
            same.shutdown(socket.SHUT_WR)

    async def rest(self) -> bytes:
        """Reads until the client closes the connection."""
        data = b""
        with suppress(ConnectionError):
            while more := await self._reader.read(65536):
                data += more
        return data


class Peers:
    """A listening server.

    Attributes:
        url: its URL.
        port: its port.
        connections: number of connections so far.
    """

    def __init__(self, script: Script) -> None:
        self.url = ""
        self.port = 0
        self.connections: list[Peer] = []
        self._script = script
        self._tasks: set[asyncio.Task[None]] = set()
        self._errors: list[BaseException] = []

    async def accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        peer = Peer(len(self.connections), reader, writer)
        self.connections.append(peer)
        try:
            await self._script(peer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client closed the connection
        except asyncio.CancelledError:
            pass  # the test is over
        except BaseException as error:  # noqa: BLE001  # raised at the end of the test
            self._errors.append(error)
        finally:
            writer.transport.abort()

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._errors:
            raise self._errors[0]


@asynccontextmanager
async def peers(
    script: Script, *, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[Peers]:
    """Runs a server; each connection runs the script and is closed after it."""
    running = Peers(script)
    server = await asyncio.start_server(running.accepted, host, 0, ssl=tls)
    running.port = server.sockets[0].getsockname()[1]
    named = f"[{host}]" if ":" in host else host
    running.url = f"{'https' if tls else 'http'}://{named}:{running.port}/v1/chat?a=b"
    try:
        yield running
    finally:
        server.close()
        await running.end()


@asynccontextmanager
async def client_of(
    url: str,
    *,
    connect_seconds: float = PATIENCE_SECONDS,
    keep_alive_seconds: float = 60.0,
    network: Network | None = None,
) -> AsyncIterator[HttpClient]:
    client = HttpClient(
        url,
        headers={"User-Agent": "test"},
        connect_seconds=connect_seconds,
        keep_alive_seconds=keep_alive_seconds,
        network=network,
    )
    try:
        yield client
    finally:
        client.close()
        await asyncio.sleep(0)  # transports close in the next iteration of the event loop


def answering(*answers: bytes) -> Script:
    """Returns a script that answers all requests of a connection."""

    async def script(peer: Peer) -> None:
        for answer in answers:
            await peer.request()
            peer.send(answer)
        await peer.rest()

    return script


def forever(before: bytes, again: bytes) -> tuple[Script, Callable[[], int]]:
    """Returns a script that sends without end, and a function that returns the sent bytes."""
    said = 0

    async def script(peer: Peer) -> None:
        nonlocal said
        await peer.request()
        peer.send(before)
        while said < FOREVER_BYTES:
            peer.send(again)
            said += len(again)
            await peer.writer.drain()
        peer.writer.write_eof()
        await peer.rest()

    return script, lambda: said


def answer(body: bytes = b"", *lines: str, status: str = "200 OK") -> bytes:
    """Returns a response with `content-length`."""
    head = "\r\n".join([f"HTTP/1.1 {status}", *lines, f"content-length: {len(body)}", "", ""])
    return head.encode() + body


async def ask(client: HttpClient, body: bytes = b"{}") -> bytes:
    """Sends a request and returns the body of the response."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await body_of(await client.post(body, headers={}))


async def body_of(response: Response) -> bytes:
    """Reads the rest of a body."""
    data = b""
    while more := await response.read():
        data += more
    return data


async def until(condition: Callable[[], bool]) -> None:
    """Waits until a condition holds."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110  # the client has no event for it
            await asyncio.sleep(0.001)


async def answer_numbers(peer: Peer) -> None:
    """A script that answers each request with the number of its connection."""
    while True:
        await peer.request()
        peer.send(answer(b"%d" % peer.number))
