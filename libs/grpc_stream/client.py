"""A client of one address: its connections, and the headers of its calls."""

from __future__ import annotations

import asyncio
import math

import grpc

from libs.addresses import authority, host_and_port, unix_path
from libs.grpc_stream.call import ServerStreamCall, ServerStreamError
from libs.grpc_stream.connection import Connection, Headers
from libs.tls import MESH_NAME, TlsFiles

CONNECT_SECONDS = 5.0
# A peer's limit of streams leads to further connections, which are closed after this much idleness.
EXTRA_CONNECTION_IDLE_SECONDS = 30.0

_MAX_TIMEOUT_VALUE = 99_999_999
_TIMEOUT_UNITS = (("u", 1e6), ("m", 1e3), ("S", 1), ("M", 1 / 60), ("H", 1 / 3600))

Metadata = tuple[tuple[str, str], ...]


class ServerStreamClient:
    """Calls one address. It connects when it is first used, and again whenever it must."""

    def __init__(self, address: str, *, tls: TlsFiles | None = None) -> None:
        """Makes a client of a `host:port`, with `tls` where it is given, or of a `unix:/path`.

        Raises:
            OSError: a file of TLS cannot be read.
        """
        self._address = address
        self._tls = None
        if tls is not None and unix_path(address) is None:
            self._tls = tls.client_context("h2")
        self._scheme = "https" if self._tls else "http"
        self._authority = authority(address)
        self._connections: list[Connection] = []
        self._connecting: asyncio.Task[Connection] | None = None
        self._closing_idle: asyncio.TimerHandle | None = None
        self._closed = False

    async def call(
        self,
        method: str,
        message: bytes,
        metadata: Metadata = (),
        *,
        timeout_seconds: float | None = None,
    ) -> ServerStreamCall:
        """Sends a request and returns its call; the caller closes it.

        Args:
            method: `/package.Service/Method`.
            message: the serialised request.
            metadata: ASCII, with names in lower case.
            timeout_seconds: how long the call may take, connecting included. The server receives
                what is left as `grpc-timeout`; the call ends with DEADLINE_EXCEEDED also here.

        Raises:
            ServerStreamError: UNAVAILABLE, no connection can be made; DEADLINE_EXCEEDED.
        """
        if timeout_seconds is None:
            deadline = None
            connection = await self._connection()
        else:
            deadline = asyncio.get_running_loop().time() + timeout_seconds
            try:
                async with asyncio.timeout_at(deadline):
                    connection = await self._connection()
            except TimeoutError as error:
                raise _deadline_exceeded() from error
        call = ServerStreamCall()
        target = (self._scheme, self._authority, method)
        headers = _request_headers(target, metadata, _remaining(deadline))
        call.start(connection, headers, message)
        if deadline is not None:
            call.expire_at(deadline)
        return call

    async def close(self) -> None:
        """Ends all calls and connections; later calls fail."""
        self._closed = True
        if self._closing_idle is not None:
            self._closing_idle.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])  # it may have connected all the same
        for connection in list(self._connections):
            connection.close()

    async def _connection(self) -> Connection:
        while not self._closed:
            for connection in self._connections:
                if connection.usable:
                    return connection
            if self._connecting is None:  # one attempt at a time, for all that wait
                self._connecting = asyncio.create_task(self._connect())
                self._connecting.add_done_callback(self._connected)
            connecting = self._connecting
            # Unlike `shield`, `wait` does not cancel the caller together with the attempt.
            await asyncio.wait([connecting])
            if not connecting.cancelled() and (failed := connecting.result().failed):
                raise self._unavailable(failed)
        raise self._unavailable("the client was closed")

    async def _connect(self) -> Connection:
        try:
            self._authority.encode("ascii")  # it becomes a header
            async with asyncio.timeout(CONNECT_SECONDS):
                connection = await self._open()
                try:
                    await connection.greeted
                except asyncio.CancelledError:  # by the timeout, or by `close`
                    connection.close()
                    raise
        except (OSError, ValueError, OverflowError) as error:  # or the address is invalid
            raise self._unavailable(repr(error)) from error
        if not connection.usable:
            why = connection.failed or "it allows no streams"
            connection.close()
            raise self._unavailable(why)
        return connection

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        path = unix_path(self._address)
        if path is not None:
            _, connection = await loop.create_unix_connection(self._new_connection, path)
        else:
            host, port = host_and_port(self._address)
            _, connection = await loop.create_connection(
                self._new_connection,
                host,
                port,
                ssl=self._tls,
                server_hostname=MESH_NAME if self._tls else None,
            )
        return connection

    def _new_connection(self) -> Connection:
        return Connection(on_lost=self._drop)

    def _unavailable(self, why: str) -> ServerStreamError:
        return ServerStreamError(
            grpc.StatusCode.UNAVAILABLE, f"cannot connect to {self._address}: {why}"
        )

    def _connected(self, task: asyncio.Task[Connection]) -> None:
        self._connecting = None
        if not task.cancelled() and task.exception() is None and not task.result().failed:
            self._connections.append(task.result())
            self._close_idle_later()

    def _drop(self, connection: Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)

    def _close_idle_later(self) -> None:
        if self._closing_idle is None and len(self._connections) > 1 and not self._closed:
            self._closing_idle = asyncio.get_running_loop().call_later(
                EXTRA_CONNECTION_IDLE_SECONDS, self._close_idle
            )

    def _close_idle(self) -> None:
        """Closes further connections that were idle for a while; the first one stays."""
        self._closing_idle = None
        latest = asyncio.get_running_loop().time() - EXTRA_CONNECTION_IDLE_SECONDS
        for connection in self._connections[1:]:
            if connection.idle and connection.idle_since_seconds <= latest:
                connection.close()
        self._close_idle_later()


def format_timeout(seconds: float) -> str:
    """Returns the value of `grpc-timeout`: at most 8 digits and a unit, rounded up.

    Raises:
        ValueError: the time is negative or not a number.
    """
    if not seconds >= 0:
        raise ValueError(f"invalid timeout: {seconds} s")
    for unit, per_second in _TIMEOUT_UNITS:
        if seconds * per_second <= _MAX_TIMEOUT_VALUE:
            return f"{math.ceil(seconds * per_second)}{unit}"
    return f"{_MAX_TIMEOUT_VALUE}H"


def _remaining(deadline: float | None) -> float | None:
    """Returns the seconds until a time of the event loop.

    Raises:
        ServerStreamError: DEADLINE_EXCEEDED, there are none.
    """
    if deadline is None:
        return None
    remaining = deadline - asyncio.get_running_loop().time()
    if remaining <= 0:
        raise _deadline_exceeded()
    return remaining


def _deadline_exceeded() -> ServerStreamError:
    return ServerStreamError(
        grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the request was sent"
    )


def _request_headers(
    target: tuple[str, str, str], metadata: Metadata, timeout_seconds: float | None
) -> Headers:
    scheme, authority, method = target
    timeout = (
        () if timeout_seconds is None else (("grpc-timeout", format_timeout(timeout_seconds)),)
    )
    fields = (
        (":method", "POST"),
        (":scheme", scheme),
        (":path", method),
        (":authority", authority),
        ("te", "trailers"),
        *timeout,
        ("content-type", "application/grpc"),
        *metadata,
    )
    return [(name.encode("ascii"), value.encode("ascii")) for name, value in fields]
