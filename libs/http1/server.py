"""An HTTP/1.1 server for the paths that must cost least; the edge is its only client.

Around each request happens what `libs.rpc.interceptors` does around an RPC: a span, metrics, a log
line of what went wrong, and whatever is raised becomes a `google.rpc.Status`: a handler's in JSON,
under the HTTP status of its code, a method's as in gRPC.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from http import HTTPStatus

import structlog
from google.protobuf import json_format
from opentelemetry import trace

from libs.clock import Clock
from libs.errors import HeadraceError, InvalidArgument, Unimplemented
from libs.http1.connection import Connection
from libs.http1.exchange import CALLER_GONE, Exchange
from libs.rpc.call_observer import MAX_REQUEST_BYTES
from libs.rpc.framing import PREFIX
from libs.rpc.grpc_http1 import GrpcHttp1Handler
from libs.rpc.status import as_headrace_error, to_status
from libs.telemetry import http_metrics
from libs.telemetry.tracing import server_span

_log = structlog.get_logger()
_tracer = trace.get_tracer("headrace.http")

HEALTH_PATH = "/healthz"
# The edge closes what it does not use before; this is for one that vanished.
QUIET_SECONDS = 120.0
# The edge asks each second whether it should come, and stays away at once when it should not.
NOTICE_SECONDS = 1.2
_BACKLOG = 1024
_CANCELLED_SECONDS = 1.0

# As the edge's transcoder has it.
_HTTP_STATUSES = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": CALLER_GONE,
    "INTERNAL": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}

_JSON = "application/json"
_TEXT = "text/plain"

Handler = Callable[[Exchange], Awaitable[None]]


class HttpServer:
    """Serves one handler or method a path, each by POST, and its health.

    Attributes:
        address: `host:port`; once it is started, with the port that it has.
    """

    def __init__(
        self,
        address: str,
        *,
        handlers: Mapping[str, Handler],
        methods: Iterable[GrpcHttp1Handler] = (),
        is_ready: Callable[[], bool],
        drain_seconds: float,
        clock: Clock,
    ) -> None:
        self.address = address
        self._answers: dict[str, tuple[str, Handler]] = {
            path: (f"POST {path}", partial(_told, handler, clock))
            for path, handler in handlers.items()
        }
        self._body_limits = {}
        for method in methods:
            self._answers[method.name] = (method.name.removeprefix("/"), method.answer)
            self._body_limits[method.name] = PREFIX.size + MAX_REQUEST_BYTES
        self._is_ready = is_ready
        self._drain_seconds = drain_seconds
        self._connections: set[Connection] = set()
        self._none_left = asyncio.Event()
        self._none_left.set()
        self._stops = False
        self._listening: asyncio.Server | None = None
        self._sweep: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Binds and serves.

        Raises:
            OSError: the address cannot be bound.
        """
        host, _, port = self.address.rpartition(":")
        loop = asyncio.get_running_loop()
        self._listening = await loop.create_server(
            self._connection, host, int(port), backlog=_BACKLOG
        )
        self.address = f"{host}:{self._listening.sockets[0].getsockname()[1]}"
        self._close_quiet()

    async def stop(self) -> None:
        """Accepts no more connections, lets running requests end for a time, then cancels them."""
        if self._listening is None or self._sweep is None:
            return
        self._stops = True
        self._sweep.cancel()
        self._listening.close()
        # Requests may be on their way, on connections that the edge keeps: it is let see first.
        notice_seconds = min(NOTICE_SECONDS, self._drain_seconds / 2)
        for connection in list(self._connections):
            connection.finish(at_once=False)
        await self._until_none_left(notice_seconds)
        for connection in list(self._connections):
            connection.finish()
        await self._until_none_left(self._drain_seconds - notice_seconds)
        for connection in list(self._connections):
            if connection.task is not None:
                connection.task.cancel()
        await self._until_none_left(_CANCELLED_SECONDS)  # what was used is still to be written down
        for connection in list(self._connections):
            connection.transport.abort()

    def _connection(self) -> Connection:
        return Connection(
            self._answer,
            max_body_bytes=lambda path: self._body_limits.get(path, MAX_REQUEST_BYTES),
            on_made=self._made,
            on_lost=self._lost,
        )

    def _made(self, connection: Connection) -> None:
        self._connections.add(connection)
        self._none_left.clear()
        if self._stops:
            connection.finish()

    def _lost(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._none_left.set()

    async def _until_none_left(self, timeout_seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._none_left.wait()

    def _close_quiet(self) -> None:
        loop = asyncio.get_running_loop()
        for connection in list(self._connections):
            quiet_seconds = loop.time() - connection.quiet_since_seconds
            if connection.task is None and quiet_seconds > QUIET_SECONDS:
                connection.transport.abort()
        self._sweep = loop.call_later(QUIET_SECONDS, self._close_quiet)

    async def _answer(self, exchange: Exchange) -> None:
        if exchange.path == HEALTH_PATH:
            healthy = HTTPStatus.OK if self._is_ready() else HTTPStatus.SERVICE_UNAVAILABLE
            exchange.whole(b"", content_type=_TEXT, status=healthy)
            return
        found = self._answers.get(exchange.path)
        if found is None or exchange.method != "POST":
            _fail(exchange, Unimplemented("no such path", reason="METHOD_NOT_FOUND"))
            return
        name, answer = found
        with server_span(_tracer, name, traceparent=exchange.headers.get("traceparent")):
            await answer(exchange)


async def _told(handler: Handler, clock: Clock, exchange: Exchange) -> None:
    """Handles a request and tells metrics, span and log how it ended."""
    started = clock.monotonic_seconds()
    status = CALLER_GONE
    try:
        status = await _handled(handler, exchange)
    finally:
        seconds = clock.monotonic_seconds() - started
        http_metrics.handled(exchange.path, status, seconds)
        span = trace.get_current_span()
        if span.is_recording():
            span.set_attributes(
                {
                    "http.request.method": "POST",
                    "http.route": exchange.path,
                    "http.response.status_code": status,
                }
            )
            if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                span.set_status(trace.StatusCode.ERROR)
        # What went well is in the metrics and the handler's own line.
        if status != HTTPStatus.OK:
            _log.info("http", path=exchange.path, status=status, duration_seconds=round(seconds, 6))


async def _handled(handler: Handler, exchange: Exchange) -> int:
    """Answers, and returns the status that stands for what happened, if it came too late."""
    try:
        if exchange.too_large:
            text = f"longer than {MAX_REQUEST_BYTES} bytes"
            raise InvalidArgument.too_large("body", text, limit_bytes=MAX_REQUEST_BYTES)  # noqa: TRY301  # one place answers errors
        await handler(exchange)
        if exchange.status is None:
            raise RuntimeError("the handler did not answer")  # noqa: TRY301  # likewise
    except Exception as raised:  # noqa: BLE001  # the boundary: everything becomes a status
        if isinstance(raised, ConnectionError) and exchange.caller_has_gone:
            return CALLER_GONE
        error = as_headrace_error(raised)
        if exchange.status is None:
            _fail(exchange, error)
        elif error is not raised:
            # Too late for a status. Of its own errors a handler has told; what nobody foresaw cuts
            # the answer, so that it does not look complete.
            exchange.cut()
        return _HTTP_STATUSES[error.code]
    return HTTPStatus.OK


def _fail(exchange: Exchange, error: HeadraceError) -> None:
    status = to_status(error)
    text = json_format.MessageToJson(status, preserving_proto_field_name=True, indent=None)
    exchange.whole(text.encode(), content_type=_JSON, status=_HTTP_STATUSES[error.code])
