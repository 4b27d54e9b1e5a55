"""The HTTP client behind a proxy, and with a private authority."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from libs.http_client import HttpError, Network, Proxies
from libs.http_client.proxies import Proxy
from tests.support.certificates import Authority
from tests.support.http_fixtures import both_loops  # noqa: F401  # fixtures
from tests.support.http_peer import (
    PATIENCE_SECONDS,
    Peer,
    answer_numbers,
    answering,
    ask,
    client_of,
    peers,
    until,
)
from tests.support.proxy import DOMAIN, running_proxy

NAME = f"provider{DOMAIN}"


def named(url: str) -> str:
    """Returns the URL of a server by a name that only the proxy can resolve."""
    return url.replace("127.0.0.1", NAME)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """A private authority, which no machine trusts."""
    return Authority(tmp_path)


@pytest.fixture
def ca_file(authority: Authority, tmp_path: Path) -> Path:
    file = tmp_path / "ca.pem"
    file.write_text(authority.pem())
    return file


async def test_an_https_server_is_reached_through_a_tunnel(authority, ca_file):
    """TLS is end to end: the proxy sees the name of the server only. The tunnel is reused."""
    tls = authority.server(names=(NAME,))
    async with peers(answer_numbers, tls=tls) as server, running_proxy() as proxy:
        network = Network(ca_file=ca_file, proxies=Proxies(https=proxy.url))
        async with client_of(named(server.url), network=network) as client:
            assert [await ask(client, bytes(size)) for size in (5, 500_000, 5)] == [b"0"] * 3
        target = f"{NAME}:{server.port}"
        assert proxy.heads == [f"CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n\r\n"]
        assert server.connections[0].head.startswith(b"POST /v1/chat?a=b HTTP/1.1\r\n")


async def test_an_http_server_is_reached_through_requests_with_the_full_url():
    """Proxies rarely allow tunnels to port 80."""
    async with peers(answer_numbers) as server, running_proxy() as proxy:
        network = Network(proxies=Proxies(http=proxy.url))
        async with client_of(named(server.url), network=network) as client:
            assert await ask(client) == b"0"
        (head,) = proxy.heads
        target = f"{NAME}:{server.port}"
        line = f"POST http://{target}/v1/chat?a=b HTTP/1.1"
        assert head.startswith(f"{line}\r\nhost: {target}\r\n")


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_the_proxy_gets_the_credentials_and_the_server_does_not(scheme, authority, ca_file):
    """Characters of the password are escaped in the URL."""
    tls = authority.server(names=(NAME,)) if scheme == "https" else None
    async with peers(answer_numbers, tls=tls) as server, running_proxy() as proxy:
        url = proxy.url.replace("http://", "http://ann:p%40ss@")
        network = Network(ca_file=ca_file, proxies=Proxies(https=url, http=url))
        async with client_of(named(server.url), network=network) as client:
            assert await ask(client) == b"0"
        assert "proxy-authorization: Basic YW5uOnBAc3M=\r\n" in proxy.heads[0]
        if tls is not None:
            assert b"proxy-authorization" not in server.connections[0].head


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "answered 407 Proxy Auth"),
        (b"HTTP/1.1 503\r\n\r\n", "answered 503"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\n\r\nearly", "before the server"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 10_000, "too large"),
    ],
)
async def test_a_proxy_that_refuses_is_an_error_that_names_it(reply, error):
    """The error shows that the proxy failed, not the provider."""
    async with running_proxy() as proxy:
        proxy.reply = lambda _head: reply
        network = Network(proxies=Proxies(https=proxy.url.replace("//", "//ann:secret@")))
        async with client_of(f"https://{NAME}/", network=network) as client:
            with pytest.raises(HttpError, match=error) as caught:
                await ask(client)
    assert f"{NAME}:443 through the proxy 127.0.0.1:" in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_a_proxy_that_closes_the_connection_is_an_error():
    """No request waits for ever."""

    async def leave(peer: Peer) -> None:
        await peer.head_of_request()

    async with peers(leave) as proxy:
        network = Network(proxies=Proxies(https=f"127.0.0.1:{proxy.port}"))
        async with client_of(f"https://{NAME}/", network=network) as client:
            with pytest.raises((HttpError, OSError)):
                await ask(client)


async def test_giving_up_while_the_proxy_connects_closes_the_socket():
    """In the middle of `CONNECT`, by a time limit or by the caller."""
    closed = asyncio.Event()

    async def mute(peer: Peer) -> None:
        await peer.rest()
        closed.set()

    async with peers(mute) as proxy:
        network = Network(proxies=Proxies(https=f"127.0.0.1:{proxy.port}"))
        async with client_of(f"https://{NAME}/", network=network, connect_seconds=0.1) as client:
            with pytest.raises(TimeoutError, match="through the proxy"):
                await ask(client)
        await asyncio.wait_for(closed.wait(), PATIENCE_SECONDS)
        closed.clear()
        async with client_of(f"https://{NAME}/", network=network) as client:
            asking = asyncio.create_task(ask(client))
            await until(lambda: len(proxy.connections) == 2)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        await asyncio.wait_for(closed.wait(), PATIENCE_SECONDS)


async def test_a_server_that_needs_no_proxy_is_reached_directly():
    """Servers on this machine never need one."""
    async with peers(answering(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\na")) as server:
        network = Network(proxies=Proxies(http="http://127.0.0.1:1"))
        async with client_of(server.url, network=network) as client:
            assert await ask(client) == b"a"


@pytest.mark.parametrize(
    ("no_proxy", "url", "direct"),
    [
        ("", "https://api.example.com", False),
        ("*", "https://api.example.com", True),
        ("example.com", "https://api.example.com", True),
        (".example.com", "https://api.example.com/v1", True),
        ("*.example.com", "https://api.example.com/v1", True),
        ("example.com", "https://notexample.com", False),
        ("EXAMPLE.com ,other.test", "https://API.example.com.", True),
        ("example.com:8443", "https://example.com", False),
        ("example.com:8443", "https://example.com:8443", True),
        ("example.com:443", "https://example.com", True),
        ("10.0.0.0/8", "https://10.1.2.3:8000", True),
        ("10.0.0.0/8", "https://11.1.2.3", False),
        ("10.1.2.3:8000", "https://10.1.2.3:8000", True),
        ("10.1.2.3", "https://10.1.2.30", False),
        ("fd00::/8", "https://[fd00::1]", True),
        ("[fd00::1]:443", "https://[fd00::1]", True),
        ("", "https://localhost:1", True),
        ("", "https://127.0.0.2", True),
        ("", "https://[::1]", True),
        (",, ,", "https://example.com", False),
    ],
)
def test_hosts_without_a_proxy_are_named_as_other_programs_read_them(no_proxy, url, direct):
    """`NO_PROXY` has no standard: this is what curl and Go agree on."""
    proxies = Proxies(https="http://proxy:3128", no_proxy=no_proxy)
    assert (proxies.proxy_of(url) is None) is direct


def test_each_scheme_has_its_proxy():
    """None is set: none is used."""
    assert Proxies(https="http://a:1").proxy_of("http://example.com") is None
    assert Proxies(http="b").proxy_of("http://example.com") == Proxy("b", 80)
    assert Proxies().proxy_of("https://example.com") is None


@pytest.mark.parametrize("url", ["socks5://u:pw@a:1", "https://a:1", "http://", "http://u:pw@a/b"])
def test_a_proxy_that_is_not_understood_is_refused_at_the_start(url):
    """Not with the first request; and its password is not repeated."""
    with pytest.raises(ValueError, match="a proxy must be") as caught:
        Proxies(https=url)
    assert "pw" not in str(caught.value)
    assert "secret" not in repr(Proxies(https="http://u:secret@a:1"))


async def test_a_private_authority_is_trusted_beside_the_machines(authority, ca_file):
    """Without the setting its servers are refused."""
    tls = authority.server(address="127.0.0.1")
    async with peers(answer_numbers, tls=tls) as server:
        async with client_of(server.url, network=Network(ca_file=ca_file)) as client:
            assert await ask(client) == b"0"
        async with client_of(server.url) as client:
            with pytest.raises(OSError, match="certificate verify failed"):
                await ask(client)


async def test_a_file_without_certificates_is_an_error_of_the_connection(tmp_path):
    """Its text says that the file is wrong."""
    file = tmp_path / "empty.pem"
    file.write_text("")
    async with peers(answer_numbers) as server:
        url = server.url.replace("http:", "https:")
        async with client_of(url, network=Network(ca_file=file)) as client:
            with pytest.raises(OSError, match=r"NO_CERTIFICATE|no certificate"):
                await ask(client)
