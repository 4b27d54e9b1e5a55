"""The body of an answer: refused where it is compressed, and no faster than it is read."""

from __future__ import annotations

import asyncio

import pytest

from libs.http_client.response import MAX_UNREAD_BYTES, HttpError, Response
from tests.support.http_fixtures import both_loops, loopback_tls, trusted_authority  # noqa: F401  # fixtures
from tests.support.http_peer import (
    Peer,
    answer,
    answering,
    ask,
    body_of,
    client_of,
    peers,
    until,
)

OK = b"HTTP/1.1 200 OK\r\n"
TEXT = b"The wheel turns. " * 1000
MIB = 1024 * 1024


# Compressed without being requested.


@pytest.mark.parametrize("encoding", ["identity", "Identity", "", "utf-8"])
async def test_an_answer_that_says_it_is_not_compressed_is_read(encoding):
    """Also where it says so strangely."""
    said = answer(TEXT, f"Content-Encoding: {encoding}")
    async with peers(answering(said)) as server, client_of(server.url) as client:
        assert await ask(client) == TEXT


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "deflate", "br", "zstd"])
async def test_a_compressed_answer_is_refused_by_name(encoding):
    """Requests ask for none; what came is not taken for text."""
    said = answer(TEXT, f"Content-Encoding: {encoding}")
    async with peers(answering(said)) as server, client_of(server.url) as client:
        with pytest.raises(HttpError, match=f"compressed .{encoding.lower()}.*not requested"):
            await ask(client)


def _is_reading(response: Response) -> bool:
    return response._transport.is_reading()


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
async def test_a_reader_that_stands_still_holds_the_server_back(secure, tls):
    """A little waits here; when it is read, the rest follows whole, and the connection is kept."""
    size, written = 24 * MIB, 0

    async def pour(peer: Peer) -> None:
        nonlocal written
        await peer.request()
        peer.send(OK, b"content-length: %d\r\n\r\n" % size)
        while written < size:
            peer.send(bytes(65536))
            written += 65536
            await peer.writer.drain()
        while await peer.request():
            peer.send(answer(b"again"))

    async with peers(pour, tls=tls if secure else None) as server, client_of(server.url) as client:
        response = await client.post(b"{}", headers={})
        await until(lambda: not _is_reading(response))
        await asyncio.sleep(0.05)  # nothing shows that the body has ended
        assert sum(map(len, response._parts)) < 3 * MAX_UNREAD_BYTES
        assert written < size
        assert len(await body_of(response)) == size
        assert await ask(client) == b"again"


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("framed", [True, False], ids=["with a length", "without"])
async def test_what_a_slow_reader_has_not_read_is_not_lost_where_the_server_closes(
    secure, framed, tls
):
    """The end of the connection comes after the bytes before it, however late they are read."""
    first, rest, paused = MAX_UNREAD_BYTES + 1, 20_000, asyncio.Event()
    length = b"content-length: %d\r\n" % (first + rest) if framed else b""

    async def pour(peer: Peer) -> None:
        await peer.request()
        peer.send(OK, length, b"connection: close\r\n\r\n", bytes(first))
        await paused.wait()
        peer.send(bytes(rest))
        await peer.writer.drain()
        peer.hang_up()
        await peer.rest()

    async with peers(pour, tls=tls if secure else None) as server, client_of(server.url) as client:
        response = await client.post(b"{}", headers={})
        await until(lambda: not _is_reading(response))
        paused.set()
        await asyncio.sleep(0.1)  # the end of the connection comes meanwhile
        assert len(await body_of(response)) == first + rest
