"""A client of token streams, with peers that tests control."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from libs.grpc_stream import ServerStreamCall, ServerStreamClient, ServerStreamError
from tests.support import http2_frames as frames
from tests.support.http2_peer import Peer, Peers, http2_peers, message

METHOD = "/test.Raw/Stream"


@dataclass
class StreamSetup:
    """A client and the peers that it calls."""

    client: ServerStreamClient
    peers: Peers

    async def start(self, settings: bytes = frames.settings({})) -> tuple[ServerStreamCall, Peer]:
        """Makes the first call, on stream 1; returns the call and the peer, which has read it."""
        call, peer = await self.call_new_peer(b"ask", settings)
        stream_id, headers, body = await peer.request()
        assert (stream_id, headers[":path"], body) == (1, METHOD, message(b"ask"))
        return call, peer

    async def call_new_peer(
        self, request: bytes, settings: bytes = frames.settings({})
    ) -> tuple[ServerStreamCall, Peer]:
        """Makes a call that needs a new connection; the peer has only sent its SETTINGS."""
        calling = asyncio.create_task(self.client.call(METHOD, request))
        peer = await self.peers.accept(settings)
        return await calling, peer

    async def is_well(self, peer: Peer, stream_id: int = 3) -> None:
        """Makes a call and checks that this peer receives and answers it."""
        call = await self.client.call(METHOD, b"")
        assert (await peer.request())[0] == stream_id
        peer.answer(stream_id, b"well")
        assert await all_of(call) == [b"well"]


@asynccontextmanager
async def client_of(address: str) -> AsyncIterator[ServerStreamClient]:
    """Opens a client."""
    client = ServerStreamClient(address)
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def talking() -> AsyncIterator[StreamSetup]:
    """Opens a client of peers that the test controls."""
    async with http2_peers() as peers, client_of(peers.address) as client:
        yield StreamSetup(client, peers)


def make_silent(client: ServerStreamClient) -> None:
    """Makes a client believe that its peer has sent nothing for a minute."""
    (connection,) = client._connections
    connection._last_read_seconds -= 60


async def all_of(call: ServerStreamCall, got: list[bytes] | None = None) -> list[bytes]:
    """Reads a call to its end; `got` receives the messages, also those before an error."""
    got = [] if got is None else got
    while messages := await call.read():
        got.extend(messages)
    return got


async def error_of(call: ServerStreamCall) -> ServerStreamError:
    """Returns the error with which a call ends."""
    with pytest.raises(ServerStreamError) as caught:
        await all_of(call)
    return caught.value
