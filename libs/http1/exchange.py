"""One request and the ways to answer it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from http import HTTPStatus
from typing import Protocol

from libs.http1.date import DateHeader
from libs.http1.request import Request
from libs.http_headers import header_lines

# For logs and metrics: the client closed the connection before it had the response.
CLIENT_CLOSED_REQUEST = 499

_LAST_CHUNK = b"0\r\n"
_PHRASES = {status.value: status.phrase for status in HTTPStatus} | {
    CLIENT_CLOSED_REQUEST: "Client Closed Request"
}
_STATUS_LINES = {status: f"HTTP/1.1 {status} {phrase}\r\n" for status, phrase in _PHRASES.items()}


class ResponseWriter(Protocol):
    """The connection that a request came on, as its exchange uses it."""

    transport: asyncio.Transport
    date: DateHeader
    paused: bool

    async def drain(self) -> None:
        """Waits while the client reads more slowly than the application writes."""


class Exchange:
    """A request and its response, which is sent as a whole (`respond`) or in parts (`send_chunk`).

    Attributes:
        request: what the client sent.
        keep_alive: the connection may be used again after the response.
        status: of the response; None before it started.
    """

    __slots__ = ("_chunked", "_connection", "keep_alive", "request", "status")

    def __init__(self, connection: ResponseWriter, request: Request, *, keep_alive: bool) -> None:
        self.request = request
        self.keep_alive = keep_alive
        self.status: int | None = None
        self._connection = connection
        self._chunked = False

    @property
    def is_closed(self) -> bool:
        """The connection is closed. A write may find that before the handler is cancelled."""
        return self._connection.transport.is_closing()

    def respond(
        self,
        body: bytes,
        *,
        content_type: str,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Sends a complete response.

        Raises:
            RuntimeError: a response was started before.
            ConnectionResetError: the client closed the connection.
        """
        head = self._start(status, content_type, headers)
        sent = b"" if self.request.method == "HEAD" else body
        self._write(f"{head}content-length: {len(body)}\r\n\r\n".encode("latin-1") + sent)

    async def send_chunk(self, data: bytes, *, content_type: str) -> None:
        """Sends a part of the response body; waits while the client reads too slowly.

        Raises:
            RuntimeError: a response that is not in parts was started before.
            ConnectionResetError: the client closed the connection.
        """
        chunk = b"%x\r\n%b\r\n" % (len(data), data) if data else b""  # length 0 means the end
        if not self._chunked:
            head = self._start(200, content_type, None)
            self._chunked = True
            chunk = f"{head}transfer-encoding: chunked\r\n\r\n".encode("latin-1") + chunk
        self._write(chunk)
        if self._connection.paused:
            await self._connection.drain()

    def end(self, trailers: bytes = b"") -> None:
        """Ends a response that was sent in parts; `trailers` are lines with their line breaks."""
        if self._chunked and not self.is_closed:
            self._chunked = False
            self._write(b"%b%b\r\n" % (_LAST_CHUNK, trailers))

    async def drain(self) -> None:
        """Waits while the client reads too slowly.

        Raises:
            ConnectionResetError: the client closed the connection.
        """
        await self._connection.drain()

    def abort(self) -> None:
        """Closes the connection immediately, so that the response does not look complete."""
        self._connection.transport.abort()

    def _start(self, status: int, content_type: str, headers: Mapping[str, str] | None) -> str:
        if self.status is not None:
            raise RuntimeError("the response was started before")
        more = header_lines(headers) if headers else ""
        close = "" if self.keep_alive else "connection: close\r\n"
        date = self._connection.date.line()
        self.status = status
        return f"{_STATUS_LINES[status]}{date}content-type: {content_type}\r\n{more}{close}"

    def _write(self, data: bytes) -> None:
        transport = self._connection.transport
        if transport.is_closing():
            raise ConnectionResetError("the client closed the connection")
        transport.write(data)
