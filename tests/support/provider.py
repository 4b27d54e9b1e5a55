"""A mock provider with OpenAI's API over real HTTP, which a test controls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

WORDS = ("The ", "wheel ", 'turns "round"', "\n", "är 水 😀", " and round.")
TEXT = "".join(WORDS)
USAGE = {"prompt_tokens": 11, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}

Handler = Callable[["MockProvider", web.Request], Awaitable[web.StreamResponse]]


@dataclass
class MockProvider:
    """A running provider.

    Attributes:
        base_url: the URL for a deployment.
        mode: how the next requests are answered, one of `MODES`.
        requests: the bodies of all requests so far.
        headers: their headers.
        peers: the client's address of each request; each connection has its own.
        asked: set when the first request arrives.
        left: set when a client closes the connection before the end of its answer.
        usage: the usage in answers, or None.
        retry_after: header `retry-after` in the modes that refuse requests.
        pause_seconds: pause between chunks in the mode `slow`.
    """

    base_url: str
    mode: str = "ok"
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    peers: list[Any] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    usage: dict[str, Any] | None = field(default_factory=lambda: USAGE)
    retry_after: str = ""
    pause_seconds: float = 0.05

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(await request.json())
        self.asked.set()
        self.headers.append(dict(request.headers))
        assert request.transport is not None
        self.peers.append(request.transport.get_extra_info("peername"))
        try:
            return await MODES[self.mode](self, request)
        except (asyncio.CancelledError, ConnectionResetError):
            self.left.set()
            raise

    def refuse(self, status: int, message: str = "no", code: str = "") -> web.Response:
        headers = {"retry-after": self.retry_after} if self.retry_after else {}
        body = {"error": {"message": message, "code": code, "type": "t", "param": None}}
        return web.json_response(body, status=status, headers=headers)

    def events(self, words: tuple[str, ...] = WORDS) -> list[bytes]:
        """Returns the events of an answer: role, text, finish reason, usage, done."""
        deltas: list[dict[str, str]] = [{"role": "assistant", "content": ""}]
        deltas += [{"content": word} for word in words]
        chunks = [_chunk([{"index": 0, "delta": delta, "finish_reason": None}]) for delta in deltas]
        chunks.append(_chunk([{"index": 0, "delta": {}, "finish_reason": "stop"}]))
        if self.usage is not None:
            chunks.append(_chunk([]) | {"usage": self.usage})
        return [
            b"data: %b\n\n" % json.dumps(chunk, ensure_ascii=False).encode() for chunk in chunks
        ] + [b"data: [DONE]\n\n"]


def write_key(folder: Path, name: str, key: str, *, url_prefix: str) -> None:
    """Writes the file of an API key, as `headrace provider key add` does."""
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / name).touch(mode=0o600)
    (folder / name).write_text(json.dumps({"key": key, "url_prefix": url_prefix}))


@asynccontextmanager
async def mock_provider(mode: str = "ok") -> AsyncIterator[MockProvider]:
    """Runs a provider."""
    provider = MockProvider(base_url="", mode=mode)
    application = web.Application()
    application.router.add_post("/v1/chat/completions", provider.answer)
    # Closing the connection cancels the request, as at real providers.
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    provider.base_url = f"http://{host}:{port}/v1"
    try:
        yield provider
    finally:
        await runner.cleanup()


def _chunk(choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "m", "choices": choices}


async def _start(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    return response


async def _ok(provider: MockProvider, request: web.Request) -> web.StreamResponse:
    if not provider.requests[-1].get("stream"):
        return await _complete(provider, request)
    response = await _start(request)
    await response.write(b"".join(provider.events()))
    return response


async def _complete(provider: MockProvider, _request: web.Request) -> web.StreamResponse:
    message = {"role": "assistant", "content": TEXT}
    body = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    return web.json_response(body | ({"usage": provider.usage} if provider.usage else {}))


async def _split(provider: MockProvider, request: web.Request) -> web.StreamResponse:
    """Splits the stream into parts of 7 bytes: within events, lines and characters."""
    response = await _start(request)
    stream = b": comment\n\n" + b"".join(provider.events()).replace(b"\n", b"\r\n")
    for start in range(0, len(stream), 7):
        await response.write(stream[start : start + 7])
        await asyncio.sleep(0)
    return response


async def _slow(provider: MockProvider, request: web.Request) -> web.StreamResponse:
    response = await _start(request)
    for event in provider.events():
        await response.write(event)
        await asyncio.sleep(provider.pause_seconds)
    return response


async def _stall_first(_provider: MockProvider, request: web.Request) -> web.StreamResponse:
    """Sends the head and keeps the connection alive, but never sends a token."""
    response = await _start(request)
    while True:
        await response.write(b": still working\n\n")
        await asyncio.sleep(0.02)


async def _stall_mute(_provider: MockProvider, _request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(3600)
    return web.Response()


async def _stall_mid(provider: MockProvider, request: web.Request) -> web.StreamResponse:
    response = await _start(request)
    await response.write(b"".join(provider.events()[:3]))
    await asyncio.sleep(3600)
    return response


async def _cut_first(_provider: MockProvider, request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def _cut_mid(provider: MockProvider, request: web.Request) -> web.StreamResponse:
    response = await _start(request)
    await response.write(b"".join(provider.events()[:3]))
    await asyncio.sleep(0.02)
    assert request.transport is not None
    request.transport.close()
    return response


async def _short(provider: MockProvider, request: web.Request) -> web.StreamResponse:
    """Ends the response correctly, but before the answer is complete."""
    response = await _start(request)
    await response.write(b"".join(provider.events()[:3]))
    return response


async def _garbage(_provider: MockProvider, request: web.Request) -> web.StreamResponse:
    response = await _start(request)
    await response.write(b"data: \x00\xff{]\n\n")
    return response


async def _not_http(_provider: MockProvider, request: web.Request) -> web.StreamResponse:
    assert isinstance(request.transport, asyncio.Transport)
    request.transport.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
    request.transport.close()
    return web.Response()


async def _error_event(_provider: MockProvider, request: web.Request) -> web.StreamResponse:
    response = await _start(request)
    await response.write(b'data: {"error": {"message": "overloaded", "code": 529}}\n\n')
    return response


async def _page(_provider: MockProvider, _request: web.Request) -> web.StreamResponse:
    return web.Response(text="<html>welcome</html>", content_type="text/html")


async def _endless(provider: MockProvider, request: web.Request) -> web.StreamResponse:
    """Ends the answer but not the response."""
    response = await _start(request)
    await response.write(b"".join(provider.events()))
    await asyncio.sleep(3600)
    return response


async def _redirect(provider: MockProvider, _request: web.Request) -> web.StreamResponse:
    raise web.HTTPTemporaryRedirect(f"{provider.base_url}/elsewhere")


async def _rate_limit(provider: MockProvider, _request: web.Request) -> web.StreamResponse:
    return provider.refuse(429)


async def _rate_limit_long(provider: MockProvider, _request: web.Request) -> web.StreamResponse:
    return web.Response(
        status=429, headers={"retry-after": provider.retry_after}, body=bytes(1 << 20)
    )


async def _rate_limit_cut(provider: MockProvider, request: web.Request) -> web.StreamResponse:
    headers = {"retry-after": provider.retry_after, "content-length": "100"}
    response = web.StreamResponse(status=429, headers=headers)
    await response.prepare(request)
    await response.write(b"half")
    assert request.transport is not None
    request.transport.close()
    return response


async def _broken(provider: MockProvider, _request: web.Request) -> web.StreamResponse:
    return provider.refuse(500)


async def _bad_request(provider: MockProvider, _request: web.Request) -> web.StreamResponse:
    return provider.refuse(400, "the roles must alternate")


async def _too_long(provider: MockProvider, _request: web.Request) -> web.StreamResponse:
    return provider.refuse(400, "too many tokens", "context_length_exceeded")


async def _bad_key(provider: MockProvider, request: web.Request) -> web.StreamResponse:
    return provider.refuse(401, f"wrong key: {request.headers.get('authorization')}")


async def _no_model(provider: MockProvider, _request: web.Request) -> web.StreamResponse:
    return provider.refuse(404, "no such model")


async def _quoting(provider: MockProvider, request: web.Request) -> web.StreamResponse:
    return provider.refuse(400, f"you sent {request.headers.get('authorization')}")


MODES: dict[str, Handler] = {
    "ok": _ok,
    "whole": _complete,
    "split": _split,
    "slow": _slow,
    "stall_first": _stall_first,
    "stall_mute": _stall_mute,
    "stall_mid": _stall_mid,
    "cut_first": _cut_first,
    "cut_mid": _cut_mid,
    "short": _short,
    "garbage": _garbage,
    "not_http": _not_http,
    "error_event": _error_event,
    "page": _page,
    "endless": _endless,
    "redirect": _redirect,
    "429": _rate_limit,
    "429_long": _rate_limit_long,
    "429_cut": _rate_limit_cut,
    "500": _broken,
    "400": _bad_request,
    "too_long": _too_long,
    "401": _bad_key,
    "404": _no_model,
    "quoting": _quoting,
}
