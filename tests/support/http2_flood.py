"""An HTTP/2 client of attacks: opens many streams, sends parts of requests, sees what ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import hpack

from tests.support import http2_frames as frames
from tests.support.http2_frames import FrameType

_HEAD_BYTES = 9
_GRPC = {"content-type": "application/grpc", "te": "trailers"}


class Attacker:
    """One connection.

    Attributes:
        answers: the headers of each stream that was answered, trailers included.
        ended: the streams that the server has ended.
        closed: whether the server has closed the connection.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.answers: dict[int, dict[str, str]] = {}
        self.ended: set[int] = set()
        self.closed = False
        self._reader = reader
        self._writer = writer
        self._decoder = hpack.Decoder()
        self._next_id = 1
        writer.write(frames.PREFACE + frames.settings({}))

    @property
    def opened(self) -> int:
        """The number of streams opened."""
        return self._next_id // 2

    @property
    def running(self) -> int:
        """The number of streams that have not ended."""
        return 0 if self.closed else self.opened - len(self.ended)

    def open(
        self,
        authority: str,
        path: str,
        headers: Mapping[str, str] = {},
        *,
        body: bytes = b"",
        complete: bool = False,
        method: str = "POST",
    ) -> int:
        """Opens a stream with these headers and the start of a body; returns its number."""
        stream_id, self._next_id = self._next_id, self._next_id + 2
        fields = {":method": method, ":scheme": "http", ":path": path, ":authority": authority}
        fields |= {**_GRPC, **headers}
        block = b"".join(frames.literal(name, value) for name, value in fields.items())
        self._writer.write(frames.frame(FrameType.HEADERS, frames.END_HEADERS, stream_id, block))
        if body or complete:
            self.send(stream_id, body, end=complete)
        return stream_id

    def send(self, stream_id: int, body: bytes, *, end: bool = False) -> None:
        """Sends more of a body. Windows are not kept: send less than they allow."""
        with suppress(ConnectionError):
            self._writer.write(frames.data(stream_id, body, end=end))

    async def sent(self) -> None:
        """Waits until the kernel has taken what was sent."""
        with suppress(ConnectionError):
            await self._writer.drain()

    async def read(self) -> None:
        """Reads until the server closes the connection."""
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await self._reader.readexactly(_HEAD_BYTES)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                self._received(head[3], head[4], int.from_bytes(head[5:], "big"), payload)
        self.closed = True

    def _received(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == FrameType.SETTINGS and not flags & frames.ACK:
            self._writer.write(frames.frame(FrameType.SETTINGS, frames.ACK, 0))
        elif kind == FrameType.PING and not flags & frames.ACK:
            self._writer.write(frames.frame(FrameType.PING, frames.ACK, 0, payload))
        elif kind == FrameType.HEADERS:
            fields = self._decoder.decode(payload)
            self.answers.setdefault(stream_id, {}).update({str(n): str(v) for n, v in fields})
        if kind == FrameType.RST_STREAM or (
            kind in {FrameType.HEADERS, FrameType.DATA} and flags & frames.END_STREAM
        ):
            self.ended.add(stream_id)


@asynccontextmanager
async def attackers(address: str, count: int) -> AsyncIterator[list[Attacker]]:
    """Opens connections, and closes them at the end."""
    host, _, port = address.rpartition(":")
    async with AsyncExitStack() as stack:
        made = []
        for _ in range(count):
            reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
            stack.callback(writer.transport.abort)
            attacker = Attacker(reader, writer)
            task = asyncio.create_task(attacker.read())
            stack.callback(task.cancel)
            made.append(attacker)
        yield made


async def until_running(attackers: Iterable[Attacker], at_most: int, *, seconds: float) -> None:
    """Waits until the streams that have not ended are at most so many."""
    group = list(attackers)
    async with asyncio.timeout(seconds):
        while sum(attacker.running for attacker in group) > at_most:  # noqa: ASYNC110 - read by tasks
            await asyncio.sleep(0.05)
