"""One connection of the HTTP client, and the parser's calls on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import httptools
from typing_extensions import override

from libs.http_client.response import HttpError, Response

# Of all heads of one response, the interim ones (1xx) included.
MAX_HEAD_BYTES = 64 * 1024
MAX_INTERIM_RESPONSES = 16

_FIRST_FINAL_STATUS = 200
# TLS reports as unsent whole writes only: a long one would count as sent.
_WRITE_BYTES = 64 * 1024


class ClientConnection(asyncio.Protocol):
    """A connection with one request at a time.

    Attributes:
        idle_since_seconds: when its last response was complete, by the loop's clock.
    """

    def __init__(self, *, on_free: Callable[[ClientConnection], None]) -> None:
        """Makes a connection; `on_free` is called when it can take another request."""
        self.idle_since_seconds = 0.0
        self._on_free = on_free
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._answered: asyncio.Future[Response] | None = None
        self._response: Response | None = None
        self._headers: dict[str, str] = {}
        self._head_bytes = 0
        self._unparsed_bytes = 0  # since the parser last found a head, body data or an end
        self._interim = False
        self._interim_count = 0

    @property
    def usable(self) -> bool:
        """Whether a request may be sent."""
        return not self._transport.is_closing()

    async def send(self, request: bytes) -> Response:
        """Sends a request and returns its response as soon as the head has arrived.

        Raises:
            HttpError: it did not arrive.
        """
        answered: asyncio.Future[Response] = self._loop.create_future()
        self._answered = answered
        self._head_bytes = self._interim_count = 0
        for at in range(0, len(request), _WRITE_BYTES):
            self._transport.write(request[at : at + _WRITE_BYTES])
        try:
            return await answered
        except BaseException:
            if self._answered is answered:  # else the connection may have another request by now
                self.abort()
            raise

    def abort(self) -> None:
        """Closes the connection immediately; data on its way is lost."""
        self._transport.abort()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    @override
    def data_received(self, data: bytes) -> None:
        self._unparsed_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._break("it switches to another protocol")
        except httptools.HttpParserError as error:
            self._break(error.__context__ or error)
        else:
            if self._unparsed_bytes > MAX_HEAD_BYTES:
                self._break(f"a head of more than {MAX_HEAD_BYTES} bytes")

    def _break(self, why: object) -> None:
        self._end(HttpError(f"invalid HTTP from the server: {why}"))
        self._transport.abort()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None and self._response is not None and self._response.until_close:
            self._end(None)
        else:
            self._end(HttpError(f"the server closed the connection: {exc or 'too early'}"))

    # What the parser calls. It wraps errors that are raised here into its own.

    def on_message_begin(self) -> None:
        """A response starts."""
        if self._answered is None:
            raise HttpError("a response without a request")
        self._headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called for each header and each trailer."""
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise HttpError(f"a head of more than {MAX_HEAD_BYTES} bytes")
        if self._response is None:  # else it is a trailer
            self._headers.setdefault(name.lower().decode("latin-1"), value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        """Called when a head is complete."""
        status = self._parser.get_status_code()
        self._interim = status < _FIRST_FINAL_STATUS
        if self._interim:
            # Their bytes are not set to 0: all heads of a response share one limit.
            self._interim_count += 1
            if self._interim_count > MAX_INTERIM_RESPONSES:
                raise HttpError(f"more than {MAX_INTERIM_RESPONSES} interim responses")
            return
        self._unparsed_bytes = self._head_bytes = 0
        if self._answered is None:
            return
        self._response = Response(status, self._headers, self._transport)
        if not self._answered.done():  # else the caller was cancelled
            self._answered.set_result(self._response)

    def on_body(self, data: bytes) -> None:
        """Called for each part of a body."""
        self._unparsed_bytes = 0
        if self._response is not None:
            self._response.feed(data)

    def on_message_complete(self) -> None:
        """Called when a response is complete."""
        if self._interim:
            return
        self._unparsed_bytes = 0
        # A server that responds before it has read all of a request may not read the rest.
        reusable = self._parser.should_keep_alive() and not self._transport.get_write_buffer_size()
        self._end(None)
        if not reusable:
            self._transport.abort()  # `close` would send the rest of the request first
        elif self.usable:
            self.idle_since_seconds = self._loop.time()
            self._on_free(self)

    def _end(self, error: HttpError | None) -> None:
        answered, self._answered = self._answered, None
        response, self._response = self._response, None
        if response is not None:
            response.end(error)
        elif answered is not None and not answered.done():
            answered.set_exception(error or HttpError("no response"))
