"""One request and the ways to answer it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from http import HTTPStatus
from typing import Protocol

from libs.http_headers import header_lines
from libs.rpc.identity import Identity, identity_in

# Nobody sees it: the caller did not wait for the answer.
CALLER_GONE = 499

_LAST_CHUNK = b"0\r\n"
_PHRASES = {status.value: status.phrase for status in HTTPStatus} | {CALLER_GONE: "Caller Gone"}
_STATUS_LINES = {
    status: f"HTTP/1.1 {status} {phrase}\r\n".encode() for status, phrase in _PHRASES.items()
}


class Answers(Protocol):
    """The connection that a request came on, as its exchange uses it."""

    transport: asyncio.Transport

    async def drain(self) -> None:
        """Waits while too much of what was written has not left."""


class Exchange:
    """A request, and two ways to answer it, of which it takes one: at once, or part by part.

    Attributes:
        path: what was asked for, without a query.
        headers: their names in lower case; of one that came more than once all, joined by commas.
        body: all of it; nothing where it was too large.
        too_large: whether the body was longer than requests may be.
        keep_alive: whether the connection may be used again.
        status: of the answer; None: none was begun.
    """

    __slots__ = (
        "_connection",
        "_in_parts",
        "body",
        "headers",
        "keep_alive",
        "method",
        "path",
        "status",
        "too_large",
    )

    def __init__(
        self,
        connection: Answers,
        *,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        too_large: bool,
        keep_alive: bool,
    ) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        self.body = body
        self.too_large = too_large
        self.keep_alive = keep_alive
        self.status: int | None = None
        self._connection = connection
        self._in_parts = False

    @property
    def identity(self) -> Identity:
        """The caller.

        Raises:
            Unauthenticated: the headers name none; the request did not come through the edge.
        """
        return identity_in(self.headers)

    @property
    def caller_has_gone(self) -> bool:
        """Whether the connection is closed: a write may notice before the handler is told."""
        return self._connection.transport.is_closing()

    def whole(
        self,
        body: bytes,
        *,
        content_type: str,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answers with one body."""
        head = self._head(status, content_type, headers or {})
        sent = b"" if self.method == "HEAD" else body
        self._write(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), sent))

    async def part(self, data: bytes, *, content_type: str) -> None:
        """Answers with a part of a body, more of which may follow; waits while its reader lags.

        Raises:
            ConnectionResetError: the caller has gone.
        """
        chunk = b"%x\r\n%b\r\n" % (len(data), data) if data else b""  # of length 0 is the last
        if not self._in_parts:
            self._in_parts = True
            head = self._head(200, content_type, {})
            chunk = b"%btransfer-encoding: chunked\r\n\r\n%b" % (head, chunk)
        self._write(chunk)
        await self._connection.drain()

    def end(self, trailers: bytes = b"") -> None:
        """Ends an answer that came in parts; trailers are lines, each with its end."""
        if self._in_parts and not self.caller_has_gone:
            self._in_parts = False
            self._write(b"%b%b\r\n" % (_LAST_CHUNK, trailers))

    async def drain(self) -> None:
        """Waits while too much of the answer has not left.

        Raises:
            ConnectionResetError: the caller has gone.
        """
        await self._connection.drain()

    def cut(self) -> None:
        """Ends the connection: whoever does not read cannot be told anything."""
        self._connection.transport.abort()

    def _head(self, status: int, content_type: str, headers: Mapping[str, str]) -> bytes:
        if self.status is not None:
            raise RuntimeError("it was answered before")
        self.status = status
        lines = f"content-type: {content_type}\r\n{header_lines(headers)}"
        if not self.keep_alive:
            lines += "connection: close\r\n"
        return _STATUS_LINES[status] + lines.encode("latin-1")

    def _write(self, data: bytes) -> None:
        transport = self._connection.transport
        if transport.is_closing():
            raise ConnectionResetError("the caller has gone")
        transport.write(data)
