"""A connection of a caller: bytes in, one exchange after the other.

Reading HTTP/1.1 is `httptools`' part, the parser of Node.js. A request is handed on when all of it
has come, and runs in a task of its own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import cast

import httptools
from typing_extensions import override

from libs.http1.exchange import Exchange

# The edge lets less pass.
MAX_HEAD_BYTES = 256 * 1024
# Of a body that is too large so much is read out, so that its sender can hear why it is refused.
MAX_REFUSED_BYTES = 64 * 1024 * 1024

_VERSION = "1.1"
_BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Connection(asyncio.Protocol):
    """A connection.

    Attributes:
        transport: its socket.
        quiet_since_seconds: by the loop's clock, when it last began or ended to do something.
    """

    def __init__(
        self,
        answer: Callable[[Exchange], Awaitable[None]],
        *,
        max_body_bytes: Callable[[str], int],
        on_made: Callable[[Connection], None],
        on_lost: Callable[[Connection], None],
    ) -> None:
        """Makes a connection.

        Args:
            answer: answers a request.
            max_body_bytes: how long the body of a request to a path may be.
            on_made: hears of its begin.
            on_lost: hears of its end, when it is closed and nothing works for it any more.
        """
        self.transport: asyncio.Transport
        self._answer = answer
        self._max_body_bytes = max_body_bytes
        self._on_made = on_made
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._path = ""
        self._headers: dict[str, str] = {}
        self._in_head = False
        self._head_bytes = self._untold_bytes = 0
        self._body: list[bytes] = []
        self._body_bytes = self._body_limit = 0
        self._exchange: Exchange | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiting: deque[Exchange] = deque()
        self._receiving = self._finishes = self._closes = False
        self._paused = False
        self._drained: asyncio.Future[None] | None = None
        self.quiet_since_seconds = self._loop.time()

    @property
    def task(self) -> asyncio.Task[None] | None:
        """What answers a request now."""
        return self._task

    def finish(self, *, at_once: bool = True) -> None:
        """Closes the connection when what has come is answered.

        Args:
            at_once: where nothing has come, it is closed; else the next request is its last.
        """
        self._finishes = True
        if self._exchange is not None:
            self._exchange.keep_alive = False
        elif at_once and not self._receiving:
            self.transport.close()

    async def drain(self) -> None:
        """Waits while too much of what was written has not left.

        Raises:
            ConnectionResetError: the caller has gone.
        """
        if self._paused and not self.transport.is_closing():
            self._drained = self._loop.create_future()
            await self._drained
        if self.transport.is_closing():
            raise ConnectionResetError("the caller has gone")

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._on_made(self)

    @override
    def data_received(self, data: bytes) -> None:
        self._untold_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._refuse()
            if not isinstance(error.__context__, ValueError | None):
                raise  # not the caller's fault
        else:
            if self._untold_bytes > MAX_HEAD_BYTES:  # of a header that does not end
                self._refuse()

    @override
    def pause_writing(self) -> None:
        self._paused = True

    @override
    def resume_writing(self) -> None:
        self._paused = False
        self._let_writer_go_on()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting.clear()
        self._let_writer_go_on()
        if self._task is None:
            self._on_lost(self)
        else:
            self._task.cancel()
            self._task.add_done_callback(lambda _: self._on_lost(self))
        del self._parser  # each knows the other: only the garbage collector would find them

    # What the parser calls. It makes an error of its own of whatever is raised here, and waits for
    # the end of a header before it tells of it.

    def on_message_begin(self) -> None:
        """A request begins."""
        self._url = b""
        self._headers = {}
        self._receiving = self._in_head = True
        self._head_bytes = self._body_bytes = 0
        self.quiet_since_seconds = self._loop.time()

    def on_url(self, url: bytes) -> None:
        """A part of its target came."""
        self._url += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header came, or a trailer."""
        self._count_head(len(name) + len(value))
        if not self._in_head:  # the edge checks headers, and lets trailers pass
            return
        key, text = name.lower().decode("latin-1"), value.decode("latin-1")
        known = self._headers.get(key)
        self._headers[key] = text if known is None else f"{known}, {text}"

    def on_headers_complete(self) -> None:
        """Its head is complete."""
        self._in_head = False
        if self._parser.get_http_version() != _VERSION:
            raise ValueError("another version of HTTP")
        self._path = self._url.partition(b"?")[0].decode("latin-1")
        self._body_limit = self._max_body_bytes(self._path)
        if self._exchange is None and self._headers.get("expect", "").lower() == "100-continue":
            self.transport.write(_CONTINUE)

    def on_body(self, data: bytes) -> None:
        """A part of its body came."""
        self._body_bytes += len(data)
        self._untold_bytes = 0
        if self._body_bytes <= self._body_limit:
            self._body.append(data)
            return
        self._body.clear()
        if self._body_bytes > MAX_REFUSED_BYTES:
            self.transport.abort()

    def on_message_complete(self) -> None:
        """It is complete."""
        self._receiving = False
        body, self._body = b"".join(self._body), []
        if self._closes or self.transport.is_closing():  # the answer before this told so
            return
        exchange = Exchange(
            self,
            method=self._parser.get_method().decode("latin-1"),
            path=self._path,
            headers=self._headers,
            body=body,
            too_large=self._body_bytes > self._body_limit,
            keep_alive=self._parser.should_keep_alive() and not self._finishes,
        )
        if self._exchange is None:
            self._begin(exchange)
        else:  # one after the other: what came in this read is all that waits
            self._waiting.append(exchange)
            self.transport.pause_reading()

    def _count_head(self, size: int) -> None:
        self._untold_bytes = 0
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("a head without bounds")

    def _begin(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._task = self._loop.create_task(self._run(exchange))

    async def _run(self, exchange: Exchange) -> None:
        try:
            await self._answer(exchange)
        except BaseException as raised:
            gone = self.transport.is_closing()
            self.transport.abort()  # half of an answer must not look whole
            if not (gone and isinstance(raised, ConnectionError)):
                raise
        finally:
            self._exchange = self._task = None
            self.quiet_since_seconds = self._loop.time()
            self._go_on(exchange)

    def _go_on(self, exchange: Exchange) -> None:
        """Takes the next request, if the last one's answer left the connection in order."""
        if self.transport.is_closing():
            return
        exchange.end()
        if exchange.status is None or not exchange.keep_alive:
            self._closes = True
            self.transport.close()
        elif self._waiting:
            self._begin(self._waiting.popleft())
            if not self._waiting:
                self.transport.resume_reading()

    def _refuse(self) -> None:
        """Ends a connection that speaks no HTTP."""
        if self._exchange is None and not self.transport.is_closing():
            self.transport.write(_BAD_REQUEST)
            self.transport.close()
        else:
            self.transport.abort()

    def _let_writer_go_on(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None
