"""A client of one HTTP/1.1 address that keeps its connections, and reads an answer as it comes.

Reading HTTP is `httptools`' part, as for the server. Each request has a connection of its own, so
that giving one up ends it at the server, too.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import cast
from urllib.parse import urlsplit

import aiohappyeyeballs
import httptools
from aiohappyeyeballs import AddrInfoType
from typing_extensions import override

from libs.http_client.response import HttpError, Response
from libs.http_headers import header_lines

MAX_HEAD_BYTES = 64 * 1024
# Another of a host's addresses is tried beside the first after so long (RFC 8305).
NEXT_ADDRESS_SECONDS = 0.25
# Many connections at once ask for the addresses of their host once.
ADDRESSES_SECONDS = 10.0

_PORTS = {"http": 80, "https": 443}
_FIRST_FINAL_STATUS = 200
# TLS tells what has not left of whole writes only: of a long one it would say that all has.
_WRITE_BYTES = 64 * 1024


class HttpClient:
    """Posts to one URL."""

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str],
        connect_seconds: float,
        keep_alive_seconds: float,
    ) -> None:
        """Makes a client, which connects when it is needed.

        Args:
            url: `http(s)://HOST[:PORT]/PATH`.
            headers: of all requests.
            connect_seconds: for a connection, TLS included.
            keep_alive_seconds: for how long one is kept that nobody uses. Shorter than what servers
                keep: one must not be closed while a request is on its way.
        """
        parts = urlsplit(url)
        self._secure = parts.scheme == "https"
        host = parts.hostname or ""
        self._host = host if host.isascii() else host.encode("idna").decode()
        self._port = parts.port or _PORTS[parts.scheme]
        self._connect_seconds = connect_seconds
        self._keep_alive_seconds = keep_alive_seconds
        named = f"[{self._host}]" if ":" in self._host else self._host
        if self._port != _PORTS[parts.scheme]:
            named += f":{self._port}"
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._head = f"POST {target} HTTP/1.1\r\nhost: {named}\r\n{header_lines(headers)}"
        self._idle: deque[ClientConnection] = deque()
        self._sweep: asyncio.TimerHandle | None = None
        self._closed = False
        self._looking_up = asyncio.Lock()
        self._found: Sequence[AddrInfoType] = ()
        self._found_until_seconds = 0.0

    async def post(self, body: bytes, *, headers: Mapping[str, str]) -> Response:
        """Sends a request and returns its answer when its head has come.

        Raises:
            HttpError: the server does not speak HTTP, or closed the connection.
            OSError: it cannot be reached, `TimeoutError` included.
        """
        head = f"{self._head}{header_lines(headers)}content-length: {len(body)}\r\n\r\n"
        request = head.encode("latin-1") + body
        connection = self._kept() or await self._connected()
        return await connection.send(request)

    def close(self) -> None:
        """Closes the connections that no answer uses, and the others when their answers end."""
        self._closed = True
        if self._sweep is not None:
            self._sweep.cancel()
        while self._idle:
            self._idle.pop().abort()

    def _kept(self) -> ClientConnection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    def _keep(self, connection: ClientConnection) -> None:
        if self._closed:
            connection.abort()
            return
        self._idle.append(connection)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(
                self._keep_alive_seconds, self._close_unused
            )

    def _close_unused(self) -> None:
        """Closes what was not used for long; the longest unused stand first."""
        loop = asyncio.get_running_loop()
        self._sweep = None
        oldest = loop.time() - self._keep_alive_seconds
        while self._idle and self._idle[0].idle_since_seconds <= oldest:
            self._idle.popleft().abort()
        if self._idle:
            at = self._idle[0].idle_since_seconds + self._keep_alive_seconds
            self._sweep = loop.call_at(at, self._close_unused)

    async def _connected(self) -> ClientConnection:
        what = f"no connection to {self._host}:{self._port}"
        try:
            async with asyncio.timeout(self._connect_seconds):
                return await self._connect()
        except TimeoutError as error:
            raise TimeoutError(f"{what} in {self._connect_seconds:g} s") from error
        except (socket.gaierror, UnicodeError, RuntimeError) as error:  # the last is uvloop's
            raise ConnectionError(f"{what}: {error}") from error

    async def _connect(self) -> ClientConnection:
        loop = asyncio.get_running_loop()
        sock = await aiohappyeyeballs.start_connection(
            await self._addresses(), happy_eyeballs_delay=NEXT_ADDRESS_SECONDS
        )
        _, connection = await loop.create_connection(
            lambda: ClientConnection(on_free=self._keep),
            sock=sock,
            ssl=_tls() if self._secure else None,
            server_hostname=self._host.rstrip(".") if self._secure else None,
        )
        return connection

    async def _addresses(self) -> Sequence[AddrInfoType]:
        """Looks the host up, once for all connections that are made in a while."""
        loop = asyncio.get_running_loop()
        async with self._looking_up:
            if loop.time() >= self._found_until_seconds:
                self._found = await loop.getaddrinfo(
                    self._host, self._port, type=socket.SOCK_STREAM
                )
                self._found_until_seconds = loop.time() + ADDRESSES_SECONDS
        return self._found


class ClientConnection(asyncio.Protocol):
    """A connection, which has one request at a time.

    Attributes:
        idle_since_seconds: by the loop's clock, when its last answer had come.
    """

    def __init__(self, *, on_free: Callable[[ClientConnection], None]) -> None:
        """Makes a connection; `on_free` hears when an answer has come, and another may be asked."""
        self.idle_since_seconds = 0.0
        self._on_free = on_free
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._answered: asyncio.Future[Response] | None = None
        self._response: Response | None = None
        self._headers: dict[str, str] = {}
        self._head_bytes = 0
        self._untold_bytes = 0  # since there was anything to make of them
        self._interim = False

    @property
    def usable(self) -> bool:
        """Whether a request may be sent."""
        return not self._transport.is_closing()

    async def send(self, request: bytes) -> Response:
        """Sends a request and returns its answer when its head has come.

        Raises:
            HttpError: it did not come.
        """
        answered: asyncio.Future[Response] = self._loop.create_future()
        self._answered = answered
        for at in range(0, len(request), _WRITE_BYTES):
            self._transport.write(request[at : at + _WRITE_BYTES])
        try:
            return await answered
        except BaseException:
            if self._answered is answered:  # else it is answered, and may be another's by now
                self.abort()
            raise

    def abort(self) -> None:
        """Closes the connection, whatever is on its way."""
        self._transport.abort()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    @override
    def data_received(self, data: bytes) -> None:
        self._untold_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._break("it changes to another protocol")
        except httptools.HttpParserError as error:
            self._break(error.__context__ or error)
        else:
            if self._untold_bytes > MAX_HEAD_BYTES:
                self._break("a head without bounds")

    def _break(self, why: object) -> None:
        self._end(HttpError(f"the server breaks HTTP: {why}"))
        self._transport.abort()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None and self._response is not None and self._response.until_close:
            self._end(None)
        else:
            self._end(HttpError(f"the server closed the connection: {exc or 'too early'}"))

    # What the parser calls. It makes an error of its own of whatever is raised here.

    def on_message_begin(self) -> None:
        """An answer begins."""
        if self._answered is None:
            raise HttpError("an answer that nobody asked for")
        self._headers = {}
        self._head_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header came, or a trailer."""
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise HttpError("a head without bounds")
        if self._response is None:  # else it is a trailer
            self._headers.setdefault(name.lower().decode("latin-1"), value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        """Its head is complete."""
        self._untold_bytes = 0
        status = self._parser.get_status_code()
        self._interim = status < _FIRST_FINAL_STATUS
        if self._interim or self._answered is None:
            return
        self._response = Response(status, self._headers, self._transport)
        if not self._answered.done():  # else whoever asked does not wait any more
            self._answered.set_result(self._response)

    def on_body(self, data: bytes) -> None:
        """A part of its body came."""
        self._untold_bytes = 0
        if self._response is not None:
            self._response.feed(data)

    def on_message_complete(self) -> None:
        """It is complete."""
        self._untold_bytes = 0
        if self._interim:
            return
        # A server that answers before it has read all of a request may not read the rest.
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
            answered.set_exception(error or HttpError("no answer"))


@cache
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
