"""The HTTP/1.1 server, byte by byte: what is a request, and where a response starts and ends."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from libs.errors import ResourceExhausted
from libs.http1 import request as http_request
from libs.rpc.http_call import HttpCall
from libs.rpc.served_call import MAX_REQUEST_BYTES
from tests.support.http_bytes import (  # noqa: F401  # fixtures
    CHUNKED,
    POST,
    TEXT,
    HttpService,
    answer,
    as_services_run,
    echo,
    one_caller,
    one_service,
    post,
    rest,
    serving_one_path,
)

pytestmark = [
    pytest.mark.integration,
    # pytest-asyncio's other way is a hook for all tests.
    pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture"),
]

_BRIEF_SECONDS = 1.5  # for what comes at once, or, where a test fails, never
_LARGE = bytes(32 << 20)  # more than the kernel's buffers take


async def test_requests_that_come_at_once_are_answered_one_after_the_other(service, caller):
    """Each starts when the response to the one before is complete, in the order of arrival."""
    running = 0

    async def handle(call: HttpCall) -> None:
        nonlocal running
        running += 1
        await asyncio.sleep(0)
        assert running == 1
        await call.send_chunk(call.body, content_type=TEXT)
        await asyncio.sleep(0)
        running -= 1

    service.handle = handle
    bodies = [b"%d" % number for number in range(100)]
    caller.writer.write(b"".join(post(body) for body in bodies))
    assert [await answer(caller) for _ in bodies] == [(200, body) for body in bodies]


async def test_reading_pauses_while_requests_of_a_connection_wait(service, caller):
    """The client's send buffer fills up."""
    service.handle = lambda _call: asyncio.Event().wait()
    caller.writer.write(post() + post() + post(_LARGE))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await caller.writer.drain()


async def test_a_request_may_come_in_single_bytes(service, caller):
    """Also with a chunked body, whose chunks may have extensions."""
    for byte in POST + CHUNKED + b"3;a=b\r\nabc\r\n2\r\nde\r\n0\r\n\r\n":
        caller.writer.write(bytes([byte]))
        await asyncio.sleep(0)
    assert await answer(caller) == (200, b"abcde")


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(POST + b"content-length: 3\r\n" + CHUNKED + b"0\r\n\r\n", id="two lengths"),
        pytest.param(POST + b"content-length: 0\r\ncontent-length: 3\r\n\r\nabc", id="or these"),
        pytest.param(POST + b"transfer-encoding: chunked, identity\r\n\r\n", id="no last chunk"),
        pytest.param(POST + CHUNKED + b"-1\r\n", id="a negative chunk"),
        pytest.param(POST + b"x: a\r\n b\r\n\r\n", id="a folded line"),
        pytest.param(POST + b"x : a\r\n\r\n", id="a space behind a name"),
        pytest.param(post().replace(b"1.1", b"1.0"), id="another version"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2"),
        pytest.param(
            POST + b"name: %b\r\n" % (b"y" * 1000) * 270 + b"\r\n", id="a head without bounds"
        ),
    ],
)
async def test_an_ambiguous_request_is_refused(service, caller, request_bytes):
    """Other parsers might read it differently. Its connection is closed."""
    handled: list[HttpCall] = []

    async def handle(call: HttpCall) -> None:
        handled.append(call)

    service.handle = handle
    caller.writer.write(request_bytes)
    status, headers = await caller.head()
    assert (status, headers["connection"]) == (400, "close")
    assert await rest(caller) == b""
    assert handled == []


async def test_one_header_without_end_is_refused(caller):
    """Before it fills the memory."""
    caller.writer.write(POST + b"x: " + bytes(8 * http_request.MAX_HEAD_BYTES).replace(b"\0", b"y"))
    async with asyncio.timeout(_BRIEF_SECONDS):
        await rest(caller)


async def test_trailers_are_ignored(service, caller):
    """The edge replaces identity headers, but forwards any trailers that its clients send."""

    async def handle(call: HttpCall) -> None:
        call.respond(str(sorted(call.identity.scopes)).encode(), content_type=TEXT)

    service.handle = handle
    caller.writer.write(POST + CHUNKED + b"0\r\nx-headrace-scopes: admin\r\n\r\n")
    assert await answer(caller) == (200, b"['infer']")


async def test_a_response_to_head_has_no_body(caller):
    """The client would read it as the next response."""
    caller.writer.write(post().replace(b"POST", b"HEAD") + post(b"next"))
    assert (await caller.head())[0] == 501
    assert await answer(caller) == (200, b"next")


async def test_an_empty_chunk_does_not_end_a_response(service, caller):
    """A chunk of length 0 means the end in HTTP."""

    async def handle(call: HttpCall) -> None:
        for data in (b"", b"a", b"", b"b"):
            await call.send_chunk(data, content_type=TEXT)

    service.handle = handle
    caller.writer.write(post())
    assert await answer(caller) == (200, b"ab")


async def test_a_client_that_expects_100_continue_gets_it(caller):
    """And then the response."""
    caller.writer.write(POST + b"expect: 100-continue\r\ncontent-length: 3\r\n\r\n")
    assert await caller.head() == (100, {})
    caller.writer.write(b"abc")
    assert await answer(caller) == (200, b"abc")


async def test_no_100_continue_is_sent_inside_a_response(service, caller):
    """It would be a part of that response."""
    may_end = asyncio.Event()

    async def handle(call: HttpCall) -> None:
        await call.send_chunk(b"a", content_type=TEXT)
        await may_end.wait()

    service.handle = handle
    caller.writer.write(post() + POST + b"expect: 100-continue\r\ncontent-length: 3\r\n\r\n")
    await caller.head()
    assert await caller.chunk() == b"a"
    may_end.set()
    assert await caller.chunk() == b""


async def test_a_second_response_is_not_sent(service, caller):
    """The client would read it as the response to the next request."""

    async def handle(call: HttpCall) -> None:
        for _ in range(2):
            call.respond(b"", content_type=TEXT)

    service.handle = handle
    caller.writer.write(post(fields=b"connection: close\r\n"))
    assert (await rest(caller)).count(b"HTTP/1.1") <= 1


async def test_a_late_chunk_does_not_reach_another_response(service, caller):
    """Such as one from a task that the handler left running."""
    ended: list[HttpCall] = []

    async def handle(call: HttpCall) -> None:
        for other in ended:
            with suppress(RuntimeError):
                await other.send_chunk(b"not yours", content_type=TEXT)
        await call.send_chunk(call.body, content_type=TEXT)
        ended.append(call)

    service.handle = handle
    for body in (b"a", b"b"):
        caller.writer.write(post(body))
        assert await answer(caller) == (200, body)


async def test_a_connection_is_reused_however_its_responses_end(service, caller):
    """The edge opens no new one for each request."""

    async def parts(call: HttpCall) -> None:
        await call.send_chunk(call.body, content_type=TEXT)
        await call.send_chunk(b"!", content_type=TEXT)

    async def expected(call: HttpCall) -> None:
        await call.send_chunk(b"half", content_type=TEXT)
        raise ResourceExhausted("full", reason="QUEUE_FULL")

    async def refused(_call: HttpCall) -> None:
        raise ResourceExhausted("full", reason="QUEUE_FULL")

    async def crashed(_call: HttpCall) -> None:
        raise RuntimeError

    health = b"GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n"
    too_large = post(bytes(MAX_REQUEST_BYTES + 1))
    for handle, request, status, start in (
        (echo, post(b"one body"), 200, b"one body"),
        (parts, post(b"parts"), 200, b"parts!"),
        (expected, post(), 200, b"half QUEUE_FULL"),
        (refused, post(), 429, b"{"),
        (crashed, post(), 500, b"{"),
        (echo, too_large, 400, b"{"),
        (echo, post().replace(b"/path", b"/elsewhere"), 501, b"{"),
        (echo, health, 200, b""),
        (echo, post(b"again"), 200, b"again"),
    ):
        service.handle = handle
        caller.writer.write(request)
        got, body = await answer(caller)
        assert (got, body[: len(start)]) == (status, start)


@pytest.mark.parametrize("in_parts", [False, True])
async def test_connection_close_is_confirmed_and_done(service, caller, in_parts):
    """After the last byte of the response."""

    async def parts(call: HttpCall) -> None:
        await call.send_chunk(b"part", content_type=TEXT)

    service.handle = parts if in_parts else echo
    caller.writer.write(post(b"part", b"connection: close\r\n"))
    _, headers = await caller.head()
    assert headers["connection"] == "close"
    assert await rest(caller) == (b"4\r\npart\r\n0\r\n\r\n" if in_parts else b"part")


async def test_an_endless_body_is_read_up_to_a_limit(caller, monkeypatch):
    """Then the connection is closed."""
    monkeypatch.setattr(http_request, "MAX_REFUSED_BYTES", 2 * MAX_REQUEST_BYTES)
    caller.writer.write(POST + CHUNKED)
    for _ in range(3):
        caller.writer.write(b"%x\r\n%b\r\n" % (MAX_REQUEST_BYTES, bytes(MAX_REQUEST_BYTES)))
    assert await rest(caller) == b""


async def test_a_handler_without_a_response_is_an_internal_error(service, caller):
    """The client would wait, and read the next response as its own."""

    async def forget(_call: HttpCall) -> None:
        pass

    service.handle = forget
    caller.writer.write(post())
    assert (await caller.head())[0] == 500
