"""Listens for connections, closes idle ones, and drains all of them when it stops."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from libs.addresses import host_and_port, unix_path
from libs.clock import Clock
from libs.http1.arrival import ArrivalLimits
from libs.http1.connection import Application, Connection
from libs.http1.date import DateHeader
from libs.tls import TlsFiles

# Clients close idle connections before; this is for one that disappeared.
IDLE_SECONDS = 120.0
# How long clients may take to notice that this server stops: the edge asks each second.
NOTICE_SECONDS = 1.2
_BACKLOG = 1024
_CANCELLED_SECONDS = 1.0


class HttpServer:
    """Serves an application over HTTP/1.1.

    Attributes:
        address: `host:port`, after `start()` with the port that was bound, or `unix:/path`.
    """

    def __init__(
        self,
        address: str,
        application: Application,
        *,
        drain_seconds: float,
        clock: Clock,
        tls: TlsFiles | None = None,
        arrival_limits: ArrivalLimits | None = None,
    ) -> None:
        """Creates a server.

        Args:
            address: `host:port` or `unix:/path`.
            application: answers the requests.
            drain_seconds: how long running requests may take when the server stops.
            clock: the time, for the `Date` header.
            tls: on TCP, clients must have a certificate of the mesh; None: any client may call.
            arrival_limits: how slowly a request may arrive; None: the defaults.
        """
        self.address = address
        self._tls = tls
        self._application = application
        self._drain_seconds = drain_seconds
        self._date = DateHeader(clock)
        self._arrival_limits = arrival_limits or ArrivalLimits()
        self._connections: set[Connection] = set()
        self._all_closed = asyncio.Event()
        self._all_closed.set()
        self._stopping = False
        self._listening: asyncio.Server | None = None
        self._sweep: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Binds and serves.

        Raises:
            OSError: the address cannot be bound.
        """
        loop = asyncio.get_running_loop()
        path = unix_path(self.address)
        if path is not None:  # a socket that a killed process left is replaced
            self._listening = await loop.create_unix_server(
                self._connection, path, backlog=_BACKLOG
            )
        else:
            host, port = host_and_port(self.address)
            self._listening = await loop.create_server(
                self._connection,
                host,
                port,
                backlog=_BACKLOG,
                ssl=self._tls.server_context("http/1.1") if self._tls else None,
            )
            self.address = f"{host}:{self._listening.sockets[0].getsockname()[1]}"
        self._close_idle()

    async def stop(self) -> None:
        """Accepts no more connections, waits for running requests, then cancels them."""
        if self._listening is None or self._sweep is None:
            return
        self._stopping = True
        self._sweep.cancel()
        self._listening.close()
        # Requests may be under way on idle connections until clients notice.
        notice_seconds = min(NOTICE_SECONDS, self._drain_seconds / 2)
        for connection in list(self._connections):
            connection.finish(at_once=False)
        await self._wait_until_closed(notice_seconds)
        for connection in list(self._connections):
            connection.finish()
        await self._wait_until_closed(self._drain_seconds - notice_seconds)
        for connection in list(self._connections):
            if connection.task is not None:
                connection.task.cancel()
        await self._wait_until_closed(_CANCELLED_SECONDS)  # cancelled requests record their usage
        for connection in list(self._connections):
            connection.transport.abort()

    def _connection(self) -> Connection:
        return Connection(
            self._application,
            date=self._date,
            arrival_limits=self._arrival_limits,
            on_open=self._opened,
            on_closed=self._closed,
        )

    def _opened(self, connection: Connection) -> None:
        self._connections.add(connection)
        self._all_closed.clear()
        if self._stopping:
            connection.finish()

    def _closed(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._all_closed.set()

    async def _wait_until_closed(self, timeout_seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._all_closed.wait()

    def _close_idle(self) -> None:
        loop = asyncio.get_running_loop()
        for connection in list(self._connections):
            idle_seconds = loop.time() - connection.active_seconds
            if connection.task is None and idle_seconds > IDLE_SECONDS:
                connection.transport.abort()
        self._sweep = loop.call_later(IDLE_SECONDS, self._close_idle)
