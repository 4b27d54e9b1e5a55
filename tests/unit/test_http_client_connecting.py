"""How the HTTP client connects: to which address, for how long, and over TLS."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

import aiohappyeyeballs
import pytest

from libs.http_client.response import HttpError
from tests.support.certificates import Authority
from tests.support.http_fixtures import both_loops, trusted_authority  # noqa: F401  # fixtures
from tests.support.http_peer import (
    PATIENCE_SECONDS,
    Peer,
    answer,
    answer_numbers,
    ask,
    client_of,
    peers,
    until,
)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_server_that_leaves_before_it_is_asked_is_an_error(scheme, authority):
    """It accepts the connection and closes it: no request waits for ever."""
    tls = authority.server(address="127.0.0.1") if scheme == "https" else None

    async def leave(_peer: Peer) -> None:
        return

    async with peers(leave, tls=tls) as server, client_of(server.url) as client:
        with pytest.raises((HttpError, OSError)):
            await ask(client)
        assert not client._idle


async def test_connecting_has_its_time():
    """TLS included: here the server accepts and says nothing; the socket is closed."""
    closed = asyncio.Event()

    async def mute(peer: Peer) -> None:
        await peer.rest()
        closed.set()

    async with peers(mute) as server:
        url = server.url.replace("http:", "https:")
        async with client_of(url, connect_seconds=0.1) as client:
            with pytest.raises(TimeoutError):
                await ask(client)
        await asyncio.wait_for(closed.wait(), PATIENCE_SECONDS)


async def test_a_connection_error_names_the_server():
    """There may be several providers in the log."""

    async def mute(peer: Peer) -> None:
        await peer.rest()

    async with peers(mute) as server:
        url = server.url.replace("http:", "https:")
        async with client_of(url, connect_seconds=0.05) as client:
            with pytest.raises(TimeoutError, match=f"127.0.0.1.*{server.port}"):
                await ask(client)


async def test_giving_up_while_connecting_closes_the_socket():
    """In the middle of TLS's handshake."""
    closed = asyncio.Event()

    async def mute(peer: Peer) -> None:
        await peer.rest()
        closed.set()

    async with peers(mute) as server:
        async with client_of(server.url.replace("http:", "https:")) as client:
            asking = asyncio.create_task(ask(client))
            await until(lambda: bool(server.connections))
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        await asyncio.wait_for(closed.wait(), PATIENCE_SECONDS)


async def test_a_refused_connection_is_an_error():
    """The error has the address."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        port = unheard.getsockname()[1]
        async with client_of(f"http://127.0.0.1:{port}/") as client:
            with pytest.raises(ConnectionRefusedError, match=str(port)):
                await ask(client)


async def test_of_several_addresses_one_that_answers_is_enough(monkeypatch):
    """If the first address of a name refuses, the next one is tried."""
    connect = aiohappyeyeballs.start_connection

    async def with_another_first(found: list[Any], **settings: Any) -> socket.socket:
        return await connect([refusing, *found], **settings)

    monkeypatch.setattr(aiohappyeyeballs, "start_connection", with_another_first)
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        refusing = (socket.AF_INET, socket.SOCK_STREAM, 6, "", unheard.getsockname())
        async with peers(answer_numbers) as server, client_of(server.url) as client:
            assert await ask(client) == b"0"


async def test_a_server_with_an_address_of_ipv6_is_reached():
    """In brackets in the URL and in the request."""
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
    async with peers(answer_numbers, host="::1") as server, client_of(server.url) as client:
        assert await ask(client) == b"0"
        assert f"host: [::1]:{server.port}\r\n".encode() in server.connections[0].head


async def test_a_certificate_of_a_trusted_authority_is_accepted(authority):
    """By address; the connection is kept as any other, and ends with its request."""
    tls = authority.server(address="127.0.0.1")
    async with peers(answer_numbers, tls=tls) as server, client_of(server.url) as client:
        assert [await ask(client, bytes(size)) for size in (5, 500_000, 5)] == [b"0"] * 3
        client.close()
        await until(server.connections[0].writer.is_closing)


async def test_tls_sends_the_name_of_the_server(authority):
    """So that a server with many names can choose its certificate."""
    asked = list[str | None]()
    tls = authority.server(names=("localhost",))
    tls.sni_callback = lambda _socket, name, _context: asked.append(name)
    async with peers(answer_numbers, tls=tls) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        async with client_of(url) as client:
            assert await ask(client) == b"0"
    assert asked == ["localhost"]


async def test_tls_is_not_spoken_to_another_name(authority):
    """The error has the reason."""
    tls = authority.server(names=("another.example",))
    async with peers(answer_numbers, tls=tls) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        async with client_of(url) as client:
            with pytest.raises(ssl.SSLCertVerificationError, match="localhost"):
                await ask(client)
    assert not any(peer.head for peer in server.connections)


async def test_a_certificate_of_an_unknown_authority_is_refused(tmp_path):
    """The machine's authorities are asked where a test says nothing else."""
    tls = Authority(tmp_path).server(address="127.0.0.1")
    async with peers(answer_numbers, tls=tls) as server, client_of(server.url) as client:
        with pytest.raises(ssl.SSLCertVerificationError, match=r"self-signed|issuer"):
            await ask(client)
    assert not any(peer.head for peer in server.connections)


async def test_a_server_without_tls_is_an_error_of_the_connection():
    """Which the caller takes for a backend that failed."""

    async def plain(peer: Peer) -> None:
        peer.send(answer())
        await peer.rest()

    async with peers(plain) as server:
        url = server.url.replace("http:", "https:")
        async with client_of(url) as client:
            with pytest.raises(ssl.SSLError):
                await ask(client)
