"""What the HTTP client makes of the bytes of an answer, of servers that keep to HTTP and others."""

from __future__ import annotations

import asyncio
import socket

import pytest

from libs.http_client.connection import MAX_HEAD_BYTES, MAX_INTERIM_RESPONSES
from libs.http_client.response import HttpError
from tests.support.http_fixtures import both_loops, loopback_tls, trusted_authority  # noqa: F401  # fixtures
from tests.support.http_peer import (
    FOREVER_BYTES,
    PATIENCE_SECONDS,
    Peer,
    Script,
    answer,
    answering,
    ask,
    body_of,
    client_of,
    forever,
    peers,
    until,
)

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
MIB = 1024 * 1024


def ending(said: bytes) -> Script:
    """Answers one request, and ends the connection."""

    async def script(peer: Peer) -> None:
        await peer.request()
        peer.send(said)
        await peer.writer.drain()
        peer.writer.write_eof()
        await peer.rest()

    return script


async def error_of(script: Script) -> str:
    async with peers(script) as server, client_of(server.url) as client:
        with pytest.raises(HttpError) as caught:
            await ask(client)
        assert not [one for one in client._idle if one.usable]
    return str(caught.value)


KEPT = [
    pytest.param(answer(b"body"), 200, b"body", id="a length"),
    pytest.param(answer(), 200, b"", id="a length of nothing"),
    pytest.param(
        CHUNKED + b"3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n", 200, b"abc0123456789", id="chunks"
    ),
    pytest.param(CHUNKED + b"0\r\n\r\n", 200, b"", id="no chunks"),
    pytest.param(
        CHUNKED + b"3;a=b\r\nabc\r\n0\r\nx-sum: 9\r\n\r\n", 200, b"abc", id="chunks and more"
    ),
    pytest.param(b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", id="204"),
    pytest.param(b"HTTP/1.1 304 Not Modified\r\n\r\n", 304, b"", id="304"),
    pytest.param(b"HTTP/1.1 200\r\ncontent-length: 1\r\n\r\na", 200, b"a", id="no reason"),
    pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" + answer(b"a"), 200, b"a", id="100"),
    pytest.param(
        b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n" * 3 + answer(b"a", status="400 No"),
        400,
        b"a",
        id="103",
    ),
    pytest.param(
        answer(b"a", "upgrade: h2,h2c", "connection: Upgrade, Keep-Alive"), 200, b"a", id="upgrade"
    ),
    pytest.param(
        b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 1\r\n\r\na",
        200,
        b"a",
        id="1.0",
    ),
    pytest.param(answer(b"a") + b"\r\n", 200, b"a", id="a line too many"),
]


@pytest.mark.parametrize("bytewise", [False, True], ids=["at once", "by bytes"])
@pytest.mark.parametrize(("said", "status", "body"), KEPT)
async def test_an_answer_ends_where_http_says_and_frees_its_connection(
    said, status, body, bytewise
):
    """However it is framed, and however the network cuts it."""

    async def say(peer: Peer) -> None:
        while await peer.request():
            for part in [said[at : at + 1] for at in range(len(said))] if bytewise else [said]:
                peer.send(part)
                await asyncio.sleep(0)

    async with peers(say) as server, client_of(server.url) as client:
        for _ in range(2):
            response = await client.post(b"{}", headers={})
            assert (response.status, await body_of(response)) == (status, body)
            assert response.done
    assert len(server.connections) == 1


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(OK + b"\r\nbody", id="no length"),
        pytest.param(b"HTTP/1.0 200 OK\r\n\r\nbody", id="1.0 without a length"),
        pytest.param(b"HTTP/1.0 200 OK\r\ncontent-length: 4\r\n\r\nbody", id="1.0"),
        pytest.param(answer(b"body", "connection: close"), id="close"),
    ],
)
async def test_a_response_that_ends_with_its_connection_is_complete(said):
    """The next request has a new connection."""
    async with peers(ending(said)) as server, client_of(server.url) as client:
        assert [await ask(client) for _ in range(2)] == [b"body"] * 2
    assert len(server.connections) == 2


async def test_an_answer_without_a_length_is_read_as_it_comes():
    """Events are not held back until the connection ends."""
    go_on = asyncio.Event()

    async def say(peer: Peer) -> None:
        await peer.request()
        peer.send(OK, b"Content-Type: Text/Event-Stream; charset=utf-8\r\n\r\nfirst")
        await go_on.wait()
        peer.send(b"second")

    async with peers(say) as server, client_of(server.url) as client:
        response = await client.post(b"{}", headers={})
        assert response.content_type == "text/event-stream"
        assert await response.read() == b"first"
        go_on.set()
        assert await body_of(response) == b"second"


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(OK, id="the head"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n", id="an interim answer"),
        pytest.param(OK + b"content-length: 9\r\n\r\nbody", id="a length"),
        pytest.param(CHUNKED + b"4\r\nbo", id="a chunk"),
        pytest.param(CHUNKED + b"4\r\nbody\r\n", id="the last chunk"),
        pytest.param(CHUNKED + b"4\r\nbody\r\n0\r\n", id="trailers"),
    ],
)
async def test_an_answer_that_is_cut_is_an_error(said):
    """Wherever the connection ends; what came before can be read, and no end is."""
    assert await error_of(ending(said)) == "the server closed the connection: too early"


async def test_a_broken_connection_is_an_error_after_the_received_part():
    """The text that was delivered is the reader's; each further read raises."""
    async with (
        peers(ending(OK + b"content-length: 9\r\n\r\nbody")) as server,
        client_of(server.url) as client,
    ):
        response = await client.post(b"{}", headers={})
        await until(lambda: response.done)
        assert await response.read() == b"body"
        for _ in range(2):
            with pytest.raises(HttpError):
                await response.read()


async def test_a_reset_is_an_error_even_where_the_end_is_the_connections():
    """Or a cut answer would count as whole."""

    async def reset(peer: Peer) -> None:
        await peer.request()
        peer.send(OK + b"\r\npart")
        await peer.head_of_request()  # the client has read the answer's head
        linger = b"\1\0\0\0\0\0\0\0"
        peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    async with peers(reset) as server, client_of(server.url) as client:
        response = await client.post(b"{}", headers={})
        assert await response.read() == b"part"
        response._transport.write(b"\r\n\r\n")
        with pytest.raises(HttpError, match="closed the connection"):
            await body_of(response)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", "Expected HTTP/", id="another protocol"),
        pytest.param(
            OK + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
            "Content-Length",
            id="two framings",
        ),
        pytest.param(
            OK + b"content-length: 1\r\ncontent-length: 2\r\n\r\nab",
            "Content-Length",
            id="two lengths",
        ),
        pytest.param(OK + b"content-length: -1\r\n\r\n", "Content-Length", id="a negative length"),
        pytest.param(
            OK + b"content-length: 99999999999999999999\r\n\r\n",
            "Content-Length",
            id="a huge length",
        ),
        pytest.param(CHUNKED + b"no\r\n", "chunk size", id="no chunk size"),
        pytest.param(CHUNKED + b"1\r\nab\r\n", "chunk", id="a chunk that is too long"),
        pytest.param(OK + b"a\0b: c\r\n\r\n", "header", id="no header"),
        pytest.param(
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
            "upgrade|another protocol",
            id="an upgrade",
        ),
    ],
)
async def test_what_is_not_http_is_an_error_that_says_why(said, text):
    """The connection is closed: the start of the next response is unknown."""
    error = await error_of(answering(said))
    assert error.startswith("invalid HTTP from the server: ")
    assert [word for word in text.split("|") if word in error]


@pytest.mark.parametrize(
    "more",
    [answer(b"second"), b"HTTP/1.1 408 Request Timeout\r\n\r\n", b"H", b"\0"],
    ids=["an answer", "a farewell", "a byte", "no HTTP"],
)
@pytest.mark.parametrize("later", [False, True], ids=["with it", "later"])
async def test_more_than_one_answer_ends_the_connection(more, later):
    """Else the next request would get an answer to none, and all after it another's."""
    go_on = asyncio.Event()

    async def say(peer: Peer) -> None:
        await peer.request()
        first = answer(b"%d" % peer.number)
        if later:
            peer.send(first)
            await go_on.wait()
            peer.send(more)
        else:
            peer.send(first, more)
        await peer.rest()

    async with peers(say) as server, client_of(server.url) as client:
        for number in range(2):
            assert await ask(client) == b"%d" % number
            go_on.set()
            await until(lambda: not [one for one in client._idle if one.usable])
            go_on.clear()


async def test_of_a_header_that_comes_twice_the_first_counts():
    """Names are returned in lower case, and empty values are kept."""
    said = answer(b"", "X-Empty:", "Retry-After: 1", "RETRY-AFTER: 2")
    async with peers(answering(said)) as server, client_of(server.url) as client:
        headers = (await client.post(b"{}", headers={})).headers
    assert headers == {"x-empty": "", "retry-after": "1", "content-length": "0"}


async def test_trailers_are_no_headers():
    """RFC 9110, 6.5.1: what came after the body says nothing on how to read it."""
    said = CHUNKED + b"1\r\na\r\n0\r\nretry-after: 9\r\n\r\n"
    async with peers(answering(said, answer())) as server, client_of(server.url) as client:
        response = await client.post(b"{}", headers={})
        await body_of(response)
        assert "retry-after" not in (await client.post(b"{}", headers={})).headers
        assert "retry-after" not in response.headers


@pytest.mark.parametrize(
    ("before", "again"),
    [
        pytest.param(OK, b"a: bcdefghij\r\n" * 1000, id="headers"),
        pytest.param(
            OK + b"a: ",
            b"b" * 65536,
            id="a header",
        ),
        pytest.param(CHUNKED + b"0\r\n", b"a: bcdefghij\r\n" * 1000, id="trailers"),
        pytest.param(
            CHUNKED + b"0\r\na: ",
            b"b" * 65536,
            id="a trailer",
        ),
        pytest.param(
            CHUNKED + b"1;a=",
            b"b" * 65536,
            id="an extension of a chunk",
        ),
    ],
)
async def test_a_head_has_a_limit(before, again):
    """Whatever grows without end: the connection is closed, and what waits in it forgotten."""
    script, said = forever(before, again)
    await error_of(script)
    assert said() < FOREVER_BYTES


@pytest.mark.parametrize(
    "again",
    [
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n", id="many"),
        pytest.param(b"HTTP/1.1 103 Hints\r\nlink: " + b"a" * 8000 + b"\r\n\r\n", id="large"),
    ],
)
async def test_interim_responses_have_a_limit(again):
    """Of number and of bytes, all together: a server may not keep a request waiting with them."""
    script, said = forever(b"", again)
    error = await error_of(script)
    assert "interim" in error or "head of more" in error
    assert said() < FOREVER_BYTES


@pytest.mark.parametrize(("count", "accepted"), [(0, True), (1, False)])
async def test_interim_responses_are_counted_for_each_request(count, accepted):
    """Up to the limit they are skipped, also on a connection that had others before."""
    interim = b"HTTP/1.1 103 Early Hints\r\n\r\n" * (MAX_INTERIM_RESPONSES + count)
    script = answering(*[interim + answer(b"a")] * 2)
    if not accepted:
        assert "more than 16 interim responses" in await error_of(script)
        return
    async with peers(script) as server, client_of(server.url) as client:
        assert [await ask(client) for _ in range(2)] == [b"a"] * 2
        assert len(server.connections) == 1


async def test_a_large_head_within_the_limit_is_read():
    """Cookies and policies of proxies are long."""
    value = "x" * (MAX_HEAD_BYTES - 100)
    async with (
        peers(answering(answer(b"a", f"x: {value}"))) as server,
        client_of(server.url) as client,
    ):
        assert (await client.post(b"{}", headers={})).headers["x"] == value


@pytest.mark.parametrize("secure", [False, pytest.param(True)])
async def test_an_answer_before_the_request_was_sent_ends_its_connection(secure, tls):
    """The rest of the request would be read as the next one."""
    go_on = asyncio.Event()

    async def refuse(peer: Peer) -> None:
        await peer.head_of_request()
        peer.send(answer(b"too large", status="413 No"))
        await go_on.wait()
        await peer.rest()

    async with (
        peers(refuse, tls=tls if secure else None) as server,
        client_of(server.url) as client,
    ):
        assert await ask(client, bytes(32 * MIB)) == b"too large"
        usable = [one for one in client._idle if one.usable]
        go_on.set()
        assert not usable


async def test_an_answer_before_the_request_was_sent_stops_the_sending():
    """Its bytes would wait in this process for as long as the server likes."""
    go_on, rest = asyncio.Event(), asyncio.get_running_loop().create_future()

    async def refuse(peer: Peer) -> None:
        await peer.head_of_request()
        peer.send(answer(b"too large", status="413 No"))
        await go_on.wait()
        rest.set_result(len(await peer.rest()))

    async with peers(refuse) as server, client_of(server.url) as client:
        assert await ask(client, bytes(32 * MIB)) == b"too large"
        await asyncio.sleep(0)
        go_on.set()
        assert await asyncio.wait_for(rest, PATIENCE_SECONDS) < 32 * MIB
