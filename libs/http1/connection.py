"""A client's connection: bytes in, one exchange after the other."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import Protocol, cast

from typing_extensions import override

from libs.http1.arrival import TIMEOUTS, ArrivalLimits
from libs.http1.date import DateHeader
from libs.http1.exchange import Exchange
from libs.http1.request import BadRequestError, Request, RequestLimits, RequestReader

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Application(RequestLimits, Protocol):
    """What a server serves."""

    async def answer(self, exchange: Exchange) -> None:
        """Answers a request. Whatever is raised closes the connection."""


class Connection(asyncio.Protocol):
    """A connection; each request runs in a task of its own, one at a time.

    Attributes:
        transport: its socket.
        date: formats the `Date` header.
        paused: the client reads too slowly: `drain` would wait.
        active_seconds: when a request last started to arrive or was answered, by the loop's clock.
    """

    def __init__(
        self,
        application: Application,
        *,
        date: DateHeader,
        arrival_limits: ArrivalLimits,
        on_open: Callable[[Connection], None],
        on_closed: Callable[[Connection], None],
    ) -> None:
        """Creates a connection.

        Args:
            application: answers its requests.
            date: formats the `Date` header.
            arrival_limits: how slowly a request may arrive.
            on_open: called when the connection is made.
            on_closed: called when it is closed and no task works for it any more.
        """
        self.transport: asyncio.Transport
        self.date = date
        self._application = application
        self._on_open = on_open
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._reader = RequestReader(self, application)
        self._exchange: Exchange | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiting: deque[Request] = deque()
        self._finishing = self._closing = False
        self.paused = False
        self._drained: asyncio.Future[None] | None = None
        self.active_seconds = self._loop.time()
        self._arrival_limits = arrival_limits
        self._progress_seconds = 0.0  # when the request that arrives grew last
        self._progress_bytes = 0
        self._arrival_timer: asyncio.TimerHandle | None = None

    @property
    def task(self) -> asyncio.Task[None] | None:
        """The task that answers a request now."""
        return self._task

    def finish(self, *, at_once: bool = True) -> None:
        """Closes the connection after the requests that have arrived are answered.

        Args:
            at_once: close an idle connection now; otherwise it may send one more request.
        """
        self._finishing = True
        if self._exchange is not None:
            self._exchange.keep_alive = False
        elif at_once and not self._reader.receiving:
            self.transport.close()

    async def drain(self) -> None:
        """Waits while the client reads more slowly than the application writes.

        Raises:
            ConnectionResetError: the client closed the connection.
        """
        if self.paused and not self.transport.is_closing():
            self._drained = self._loop.create_future()
            await self._drained
        if self.transport.is_closing():
            raise ConnectionResetError("the client closed the connection")

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._on_open(self)

    @override
    def data_received(self, data: bytes) -> None:
        reader = self._reader
        try:
            reader.feed(data)
        except BadRequestError as error:
            self._refuse(error.status)
        except BaseException:
            self._refuse()
            raise
        if reader.receiving:  # nearly always the read had all of the request
            self._note_progress()

    # Called by the reader.

    def request_began(self) -> None:
        """A request starts to arrive."""
        self.active_seconds = self._loop.time()
        self._progress_bytes = 0

    def continue_expected(self) -> None:
        """The client waits for status 100; inside a response it would be a part of that."""
        if self._exchange is None:
            self.transport.write(_CONTINUE)

    def request_received(self, request: Request) -> None:
        """A request is complete."""
        if self._closing or self.transport.is_closing():  # the last response announced that
            return
        if self._exchange is None:
            self._start(request)
        else:  # at most what one read contained waits
            self._waiting.append(request)
            self.transport.pause_reading()

    def body_too_long(self) -> None:
        """A body does not end."""
        self.transport.abort()

    # Called by the transport.

    @override
    def pause_writing(self) -> None:
        self.paused = True

    @override
    def resume_writing(self) -> None:
        self.paused = False
        self._wake_writer()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting.clear()
        self._wake_writer()
        if self._arrival_timer is not None:
            self._arrival_timer.cancel()
        if self._task is None:
            self._on_closed(self)
        else:
            self._task.cancel()
            self._task.add_done_callback(lambda _: self._on_closed(self))
        self._reader.close()

    def _start(self, request: Request) -> None:
        keep_alive = request.keep_alive and not self._finishing
        self._exchange = Exchange(self, request, keep_alive=keep_alive)
        self._task = self._loop.create_task(self._run(self._exchange))

    async def _run(self, exchange: Exchange) -> None:
        try:
            await self._application.answer(exchange)
        except BaseException as raised:
            closed = self.transport.is_closing()
            self.transport.abort()  # a response that broke off must not look complete
            if not (closed and isinstance(raised, ConnectionError)):
                raise
        finally:
            self._exchange = self._task = None
            self.active_seconds = self._loop.time()
            self._next(exchange)

    def _next(self, exchange: Exchange) -> None:
        """Ends an exchange and starts the next, if the connection can still be used."""
        if self.transport.is_closing():
            return
        exchange.end()
        if exchange.status is None or not exchange.keep_alive:
            self._closing = True
            self.transport.close()
        elif self._waiting:
            self._start(self._waiting.popleft())
            if not self._waiting:
                self.transport.resume_reading()

    def _note_progress(self) -> None:
        """Notes that a part of a request arrived, and starts the timer for the rest."""
        size = self._reader.received_bytes
        if size != self._progress_bytes:
            self._progress_bytes = size
            self._progress_seconds = self._loop.time()
        if self._arrival_timer is None:
            self._watch_arrival()

    def _watch_arrival(self) -> None:
        self._arrival_timer = self._loop.call_at(self._due_seconds(), self._check_progress)

    def _due_seconds(self) -> float:
        return self._arrival_limits.due_seconds(
            began_seconds=self.active_seconds,
            grew_seconds=self._progress_seconds,
            size_bytes=self._progress_bytes,
        )

    def _check_progress(self) -> None:
        """Ends the request that arrives, if it has arrived too slowly."""
        self._arrival_timer = None
        if not self._reader.receiving or self.transport.is_closing():
            return
        if self._waiting:  # not read meanwhile
            self.active_seconds = self._progress_seconds = self._loop.time()
        elif self._loop.time() >= self._due_seconds():
            self._time_out()
            return
        self._watch_arrival()

    def _time_out(self) -> None:
        TIMEOUTS.inc()
        if self._exchange is not None:
            self.finish()  # the response to an earlier request is under way
        elif self._reader.in_head:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)
        else:
            self._start(self._reader.time_out())

    def _refuse(self, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        """Ends a connection whose bytes cannot be read."""
        if self._exchange is None and not self.transport.is_closing():
            self.transport.write(
                f"HTTP/1.1 {status.value} {status.phrase}\r\n{self.date.line()}"
                "content-length: 0\r\nconnection: close\r\n\r\n".encode()
            )
            self.transport.close()
        else:
            self.transport.abort()

    def _wake_writer(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None
