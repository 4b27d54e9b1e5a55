"""An HTTP/2 server that a test controls frame by frame; it can also send invalid frames."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import hpack

from tests.support import http2_frames as frames
from tests.support.http2_frames import Frame, FrameType, data

ANSWER = {":status": "200", "content-type": "application/grpc"}
OK = {"grpc-status": "0"}

_HEAD_BYTES = 9


class Peer:
    """The server side of one connection.

    Attributes:
        seen: all frames read so far.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.seen: list[Frame] = []
        self._headers: dict[int, dict[str, str]] = {}
        self._reader = reader
        self._writer = writer
        self._encoder = hpack.Encoder()
        self._decoder = hpack.Decoder()

    async def greet(self, settings: bytes) -> None:
        """Reads the client preface and sends SETTINGS."""
        assert await self._reader.readexactly(len(frames.PREFACE)) == frames.PREFACE
        self.send(settings)

    async def next(self, kind: FrameType, *, ack: bool = False) -> Frame:
        """Returns the next frame of a kind; skips all others."""
        while True:
            frame = await self._read()
            is_ack = kind in {FrameType.SETTINGS, FrameType.PING} and frame.flags & frames.ACK
            if frame.type == kind and bool(is_ack) == ack:
                return frame

    async def request(self) -> tuple[int, dict[str, str], bytes]:
        """Reads a request; returns its stream id, headers and body."""
        head = await self.next(FrameType.HEADERS)
        body = b""
        while True:
            data = await self.next(FrameType.DATA)
            assert data.stream_id == head.stream_id
            body += data.payload
            if data.flags & frames.END_STREAM:
                return head.stream_id, self._headers[head.stream_id], body

    async def closed(self) -> None:
        """Reads until the client has closed the connection."""
        try:
            while True:
                await self._read()
        except (asyncio.IncompleteReadError, ConnectionResetError):
            return

    def send(self, *made: bytes) -> None:
        """Sends bytes in one write."""
        self._writer.write(b"".join(made))

    def block(self, fields: dict[str, str]) -> bytes:
        """Encodes headers and updates the HPACK table, so they must be sent next."""
        return self._encoder.encode(list(fields.items()), huffman=False)

    def headers(self, stream_id: int, fields: dict[str, str], *, end: bool = False) -> bytes:
        """Returns a HEADERS frame, which must be sent next."""
        flags = frames.END_HEADERS | end * frames.END_STREAM
        return frames.frame(FrameType.HEADERS, flags, stream_id, self.block(fields))

    def answer(self, stream_id: int, *messages: bytes) -> None:
        """Sends a complete response."""
        self.send(
            self.headers(stream_id, ANSWER),
            *(data(stream_id, message(body)) for body in messages),
            self.headers(stream_id, OK, end=True),
        )

    def cut(self) -> None:
        """Aborts the connection."""
        self._writer.transport.abort()

    async def _read(self) -> Frame:
        head = await self._reader.readexactly(_HEAD_BYTES)
        length = int.from_bytes(head[:3], "big")
        stream_id = int.from_bytes(head[5:], "big")
        payload = await self._reader.readexactly(length)
        frame = Frame(head[3], head[4], stream_id, payload)
        self.seen.append(frame)
        if (
            frame.type == FrameType.HEADERS
        ):  # all blocks, because later ones refer to the table that earlier ones change
            fields = self._decoder.decode(payload)
            self._headers[stream_id] = {str(name): str(value) for name, value in fields}
        return frame


class Peers:
    """Listens for connections.

    Attributes:
        address: `host:port`.
    """

    def __init__(self) -> None:
        self.address = ""
        self._waiting: asyncio.Queue[Peer] = asyncio.Queue()
        self._writers: list[asyncio.StreamWriter] = []

    @property
    def count(self) -> int:
        """Number of connections so far."""
        return len(self._writers)

    async def accept(self, settings: bytes = frames.settings({})) -> Peer:
        """Returns the next connection, after the exchange of SETTINGS."""
        peer = await self._waiting.get()
        await peer.greet(settings)
        return peer

    def accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Called for each new connection."""
        self._writers.append(writer)
        self._waiting.put_nowait(Peer(reader, writer))

    def cut(self) -> None:
        """Ends all connections."""
        for writer in self._writers:
            writer.transport.abort()


@asynccontextmanager
async def http2_peers() -> AsyncIterator[Peers]:
    """Listens on the loopback interface."""
    peers = Peers()
    server = await asyncio.start_server(peers.accepted, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    peers.address = f"{host}:{port}"
    try:
        yield peers
    finally:
        server.close()
        peers.cut()
        await server.wait_closed()


def message(body: bytes, *, compressed: bool = False) -> bytes:
    """Returns a gRPC message with its length prefix."""
    return struct.pack(">BI", compressed, len(body)) + body
