"""The HTTP client's connections: when they are kept, given up and closed, and what is asked."""

from __future__ import annotations

import asyncio

import pytest

from libs.http_client import HttpClient
from libs.http_client.connection import ClientConnection
from tests.support.http_fixtures import both_loops  # noqa: F401  # fixtures
from tests.support.http_peer import (
    PATIENCE_SECONDS,
    Peer,
    answer,
    answer_numbers,
    answering,
    ask,
    body_of,
    client_of,
    peers,
    until,
)


def idle(client: HttpClient) -> list[ClientConnection]:
    """Returns those that the next request may use."""
    return [connection for connection in client._idle if connection.usable]


async def test_each_test_runs_on_both_loops(_asyncio_loop_factory):  # noqa: PT019  # to compare
    """What pytest-asyncio calls the fixture above is its own affair."""
    asked = _asyncio_loop_factory()
    asked.close()
    assert type(asyncio.get_running_loop()) is type(asked)


async def test_a_request_has_the_required_headers():
    """Line, host, headers of all requests and of this one, and the length of the body."""
    async with peers(answering(answer())) as server, client_of(server.url) as client:
        response = await client.post(b"12345", headers={"Authorization": "Bearer ä"})
        (peer,) = server.connections
    assert response.status == 200
    assert peer.head.decode("latin-1") == (
        "POST /v1/chat?a=b HTTP/1.1\r\n"
        f"host: 127.0.0.1:{server.port}\r\n"
        "User-Agent: test\r\n"
        "Authorization: Bearer ä\r\n"
        "content-length: 5\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("url", "line", "host"),
    [
        ("http://example.com", "POST / HTTP/1.1", "example.com"),
        ("http://example.com:80/a", "POST /a HTTP/1.1", "example.com"),
        ("https://example.com:443/a", "POST /a HTTP/1.1", "example.com"),
        ("https://example.com:80/a", "POST /a HTTP/1.1", "example.com:80"),
        ("https://BÜCHER.example/a", "POST /a HTTP/1.1", "xn--bcher-kva.example"),
        ("http://[::1]:8000/a", "POST /a HTTP/1.1", "[::1]:8000"),
        ("http://[2001:DB8::1]/a", "POST /a HTTP/1.1", "[2001:db8::1]"),
    ],
)
def test_a_host_is_named_as_servers_expect(url, line, host):
    """Without the port that the scheme has anyway, names in ASCII, addresses in brackets."""
    client = HttpClient(url, headers={}, connect_seconds=1, keep_alive_seconds=1)
    assert client._head == f"{line}\r\nhost: {host}\r\n"


async def test_one_request_after_the_other_needs_one_connection():
    """Also where bodies are empty or large."""
    async with peers(answer_numbers) as server, client_of(server.url) as client:
        assert [await ask(client, bytes(size)) for size in (0, 1, 3_000_000, 5)] == [b"0"] * 4


async def test_requests_at_once_have_a_connection_each():
    """All are kept, and the one used last is used first: the others may rest until they end."""
    together = asyncio.Barrier(3)

    async def meet(peer: Peer) -> None:
        while body := await peer.request():
            if body == b"together":
                await together.wait()
            peer.send(answer(b"%d" % peer.number))

    async with peers(meet) as server, client_of(server.url) as client:
        got = await asyncio.gather(*(ask(client, b"together") for _ in range(3)))
        assert sorted(got) == [b"0", b"1", b"2"]
        first = await ask(client)
        assert [await ask(client) for _ in range(3)] == [first] * 3
        again = await asyncio.gather(*(ask(client, b"together") for _ in range(3)))
        assert sorted(again) == [b"0", b"1", b"2"]
    assert len(server.connections) == 3


async def test_a_response_with_an_unread_body_frees_its_connection():
    """The received body can be read later, while the connection serves another request."""
    async with peers(answer_numbers) as server, client_of(server.url) as client:
        unread = await client.post(b"{}", headers={})
        await until(lambda: unread.done)
        assert await ask(client) == b"0"
        unread.close()  # no longer its connection
        assert await ask(client) == b"0"
        assert await body_of(unread) == b"0"


async def test_a_connection_that_ended_while_idle_is_not_used():
    """A connection closed by the server does not fail the next request."""

    async def once(peer: Peer) -> None:
        await peer.request()
        peer.send(answer(b"%d" % peer.number))
        await peer.writer.drain()
        peer.writer.write_eof()
        await peer.rest()

    async with peers(once) as server, client_of(server.url) as client:
        for number in range(3):
            assert await ask(client) == b"%d" % number
            await until(lambda: not idle(client))


async def test_an_idle_connection_is_closed():
    """After its time, so that no request meets one that the server is about to close."""
    closed = asyncio.Event()

    async def wait(peer: Peer) -> None:
        await peer.request()
        peer.send(answer(b"%d" % peer.number))
        await peer.rest()
        closed.set()

    async with peers(wait) as server, client_of(server.url, keep_alive_seconds=0.05) as client:
        assert await ask(client) == b"0"
        await asyncio.wait_for(closed.wait(), PATIENCE_SECONDS)
        assert not client._idle
        assert await ask(client) == b"1"  # and its timer is set again
        await until(lambda: not client._idle)


async def test_closing_the_client_closes_what_it_keeps():
    """The server sees it at once; a client that was closed has no timer that keeps it alive."""
    closed = asyncio.Event()

    async def wait(peer: Peer) -> None:
        await peer.request()
        peer.send(answer())
        await peer.rest()
        closed.set()

    async with peers(wait) as server, client_of(server.url) as client:
        await ask(client)
        client.close()
        await asyncio.wait_for(closed.wait(), PATIENCE_SECONDS)


async def test_a_connection_that_comes_back_after_closing_is_closed():
    """Otherwise it would never be closed."""
    go_on = asyncio.Event()

    async def wait(peer: Peer) -> None:
        await peer.request()
        await go_on.wait()
        peer.send(answer(b"late"))
        await peer.rest()

    async with peers(wait) as server, client_of(server.url) as client:
        asking = asyncio.create_task(ask(client))
        await until(lambda: bool(server.connections and server.connections[0].head))
        client.close()
        go_on.set()
        assert await asking == b"late"
        assert not idle(client)


@pytest.mark.parametrize("read_first", [False, True], ids=["its head", "its body"])
async def test_a_request_that_is_given_up_ends_at_the_server(read_first):
    """Also while waiting for the head or the body, so that the provider stops."""
    closed = asyncio.Event()

    async def begin(peer: Peer) -> None:
        await peer.request()
        if read_first:
            peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\npart")
        await peer.rest()
        closed.set()

    async with peers(begin) as server, client_of(server.url) as client:
        if read_first:
            response = await client.post(b"{}", headers={})
            assert await response.read() == b"part"
            response.close()
        else:
            asking = asyncio.create_task(client.post(b"{}", headers={}))
            await until(lambda: bool(server.connections and server.connections[0].head))
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        await asyncio.wait_for(closed.wait(), PATIENCE_SECONDS)
        assert not client._idle


async def test_giving_up_while_reading_leaves_the_response_to_be_closed():
    """A read that was cancelled loses nothing; the next one returns what came meanwhile."""
    go_on = asyncio.Event()

    async def begin(peer: Peer) -> None:
        await peer.request()
        peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n")
        await go_on.wait()
        peer.send(b"body")
        await peer.rest()

    async with peers(begin) as server, client_of(server.url) as client:
        response = await client.post(b"{}", headers={})
        reading = asyncio.create_task(response.read())
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        go_on.set()
        assert await body_of(response) == b"body"


async def test_a_request_given_up_as_its_answer_comes_spares_who_has_the_connection_now(
    monkeypatch,
):
    """The answer freed the connection, and another request took it, in the same turn."""
    begin, tasks = ClientConnection.on_message_begin, list[asyncio.Task[bytes]]()

    def give_up_now(connection: ClientConnection) -> None:
        if len(tasks) == 1:
            tasks.append(asyncio.create_task(ask(client)))  # runs before the one that gives up
            tasks[0].cancel()
        begin(connection)

    monkeypatch.setattr(ClientConnection, "on_message_begin", give_up_now)
    async with peers(answer_numbers) as server, client_of(server.url) as client:
        tasks.append(asyncio.create_task(ask(client)))
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        assert await tasks[1] == b"0"


@pytest.mark.parametrize(
    "value",
    [
        "a\r\nb: c",
        "a\nb",
        pytest.param("a\rb"),
        pytest.param("a\0b"),
    ],
)
async def test_a_value_that_would_add_headers_is_refused(value):
    """Some servers end a line at a bare CR, too; nothing is sent."""
    async with peers(answer_numbers) as server, client_of(server.url) as client:
        with pytest.raises(ValueError, match="header"):
            await client.post(b"{}", headers={"a": value})
        assert not any(peer.head for peer in server.connections)


async def test_headers_that_are_refused_cost_no_connection():
    """The one that was taken for the request would never be closed."""
    async with peers(answer_numbers) as server, client_of(server.url) as client:
        assert await ask(client) == b"0"
        with pytest.raises(ValueError, match="header"):
            await client.post(b"{}", headers={"a": "b\nc"})
        assert len(idle(client)) == 1
