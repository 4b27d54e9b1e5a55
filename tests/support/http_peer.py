"""A peer that speaks HTTP/1.1 byte by byte, as a test tells it: also what no server would say."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from libs.http_client import HttpClient, Network, Response

# Longer than any test waits for what comes, on the slowest machine.
PATIENCE_SECONDS = 20.0
# More than the kernel and both loops hold.
FOREVER_BYTES = 16 * 1024 * 1024

Script = Callable[["Peer"], Awaitable[None]]


class Peer:
    """The other end of one connection of a client's.

    Attributes:
        number: of the connection, from 0.
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
        """Returns the next request's body.

        Raises:
            IncompleteReadError: the client has gone.
        """
        self.head = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", self.head)
        assert length is not None
        return await self._reader.readexactly(int(length[1]))

    async def head_of_request(self) -> None:
        """Reads no more than a request's head."""
        self.head = await self._reader.readuntil(b"\r\n\r\n")

    def send(self, *parts: bytes) -> None:
        """Sends bytes, in one go."""
        self.writer.write(b"".join(parts))

    def hang_up(self) -> None:
        """Says that nothing more will be sent, below TLS and without its farewell."""
        held = self.writer.get_extra_info("socket")
        with socket.socket(fileno=os.dup(held.fileno())) as same:
            same.shutdown(socket.SHUT_WR)

    async def rest(self) -> bytes:
        """Returns all that comes until the client closes the connection."""
        data = b""
        with suppress(ConnectionError):
            while more := await self._reader.read(65536):
                data += more
        return data


class Peers:
    """What listens.

    Attributes:
        url: where.
        port: its port.
        connections: that came so far.
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
            pass  # the client has gone
        except asyncio.CancelledError:
            pass  # the test is over
        except BaseException as error:  # noqa: BLE001  # told where the test ends
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
    """Listens; each connection follows the script, and is closed at its end."""
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
        await asyncio.sleep(0)  # transports close a turn later


def answering(*answers: bytes) -> Script:
    """Answers one request after the other; then waits for the client to go."""

    async def script(peer: Peer) -> None:
        for answer in answers:
            await peer.request()
            peer.send(answer)
        await peer.rest()

    return script


def forever(before: bytes, again: bytes) -> tuple[Script, Callable[[], int]]:
    """Says something without end; and tells how many bytes the client let come."""
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
    """Returns an answer with a length."""
    head = "\r\n".join([f"HTTP/1.1 {status}", *lines, f"content-length: {len(body)}", "", ""])
    return head.encode() + body


async def ask(client: HttpClient, body: bytes = b"{}") -> bytes:
    """Returns the body of the answer to a request."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await body_of(await client.post(body, headers={}))


async def body_of(response: Response) -> bytes:
    """Returns the rest of a body."""
    data = b""
    while more := await response.read():
        data += more
    return data


async def until(condition: Callable[[], bool]) -> None:
    """Returns as soon as it holds."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110  # the client has no event for it
            await asyncio.sleep(0.001)


async def tell_numbers(peer: Peer) -> None:
    """Tells in each answer which connection it came by, until the client goes."""
    while True:
        await peer.request()
        peer.send(answer(b"%d" % peer.number))
