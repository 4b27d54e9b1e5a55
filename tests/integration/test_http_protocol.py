"""What the HTTP/1.1 server requires of a request's head, and what every response has."""

from __future__ import annotations

import json
from email.utils import parsedate_to_datetime

import pytest

from libs.clock import SystemClock
from libs.rpc.http_call import HttpCall
from tests.support.http_bytes import (  # noqa: F401  # fixtures
    CHUNKED,
    POST,
    TEXT,
    answer,
    as_services_run,
    one_caller,
    one_service,
    post,
    rest,
)

pytestmark = [
    pytest.mark.integration,
    # pytest-asyncio's other way is a hook for all tests.
    pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture"),
]

_UPGRADE = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"


def _message(body: bytes) -> str:
    return str(json.loads(body)["message"])


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(post(b"abc", _UPGRADE), id="with a length"),
        pytest.param(POST + _UPGRADE + CHUNKED + b"3\r\nabc\r\n0\r\n\r\n", id="in chunks"),
        pytest.param(
            post(b"abc", b"connection: upgrade\r\nupgrade: websocket\r\n"), id="websocket"
        ),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
async def test_a_request_for_an_upgrade_is_answered_as_http_1_1(caller, request_bytes, at_once):
    """A server may ignore `Upgrade`. The body belongs to the request, not to the next one."""
    parts = [request_bytes, post(b"next")] if at_once else []
    for part in parts or [bytes([byte]) for byte in request_bytes + post(b"next")]:
        caller.writer.write(part)
    assert await answer(caller) == (200, b"abc")
    assert await answer(caller) == (200, b"next")


async def test_an_upgrade_without_a_body_is_ignored_too(caller):
    """Also several in one read."""
    caller.writer.write((POST + _UPGRADE + b"\r\n") * 3 + post(b"next"))
    for body in (b"", b"", b"", b"next"):
        assert await answer(caller) == (200, body)


async def test_connect_opens_no_tunnel(caller):
    """What follows it is not read as requests."""
    caller.writer.write(b"CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n" + post(b"inside"))
    assert (await answer(caller))[0] == 501
    assert await rest(caller) == b""


async def test_the_framing_behind_an_upgrade_is_checked_as_strictly(caller):
    """Two lengths contradict each other."""
    caller.writer.write(POST + _UPGRADE + b"content-length: 3\r\n" + CHUNKED + b"0\r\n\r\n")
    assert (await caller.head())[0] == 400


@pytest.mark.parametrize("path", [b"/path", b"/healthz", b"/elsewhere"])
async def test_a_request_needs_a_host(caller, path):
    """Each one, and the connection stays usable."""
    for method in (b"GET", b"POST"):
        caller.writer.write(method + b" " + path + b" HTTP/1.1\r\ncontent-length: 0\r\n\r\n")
        status, body = await answer(caller)
        assert (status, _message(body)) == (400, "the header host is missing")
    caller.writer.write(post(b"next"))
    assert await answer(caller) == (200, b"next")


@pytest.mark.parametrize(
    "name",
    [
        *("host", "authorization", "content-type", "user-agent", "origin"),
        *("x-headrace-tenant", "x-headrace-user", "x-headrace-scopes", "x-headrace-usage-id"),
        *("traceparent", "grpc-timeout", "grpc-encoding", "x-stainless-read-timeout"),
    ],
)
@pytest.mark.parametrize("second", [b"same", b"other"])
async def test_a_header_with_one_value_must_not_be_repeated(service, caller, name, second):
    """Joined, the two would be a tenant, a deadline or a trace that no one sent."""
    handled = []

    async def handle(call: HttpCall) -> None:
        handled.append(call)

    service.handle = handle
    lines = b"%b: same\r\n%b: %b\r\n" % (name.encode(), name.title().encode(), second)
    caller.writer.write(post(fields=lines))
    status, body = await answer(caller)
    assert (status, _message(body)) == (400, f"the header {name} must not be repeated")
    assert handled == []


async def test_lists_and_custom_headers_may_be_repeated(service, caller):
    """Their values are joined by commas, in order."""
    seen: dict[str, str] = {}

    async def handle(call: HttpCall) -> None:
        seen.update(call.headers)
        call.respond(b"")

    service.handle = handle
    lines = (
        b"accept: a\r\naccept: b\r\nTraceState: c=1\r\ntracestate: d=2\r\nx-own: e\r\nx-own: f\r\n"
    )
    caller.writer.write(post(fields=lines + b"cookie: g=1\r\ncookie: h=2\r\n"))
    assert (await answer(caller))[0] == 200
    assert [seen[name] for name in ("accept", "tracestate", "x-own", "cookie")] == [
        *("a, b", "c=1, d=2", "e, f", "g=1; h=2")
    ]


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(post(b"abc"), id="a response"),
        pytest.param(post().replace(b"/path", b"/elsewhere"), id="an error"),
        pytest.param(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n", id="health"),
        pytest.param(b"nonsense\r\n\r\n", id="a request that cannot be read"),
    ],
)
async def test_every_response_has_a_date(caller, request_bytes):
    """In the form that HTTP prescribes, and of now."""
    caller.writer.write(request_bytes)
    _, headers = await caller.head()
    assert headers["date"].endswith(" GMT")
    age = SystemClock().now() - parsedate_to_datetime(headers["date"])
    assert -1 < age.total_seconds() < 10


async def test_a_response_in_chunks_has_a_date(service, caller):
    """It is a response like any other."""

    async def handle(call: HttpCall) -> None:
        await call.send_chunk(b"a", content_type=TEXT)

    service.handle = handle
    caller.writer.write(post())
    assert "date" in (await caller.head())[1]
