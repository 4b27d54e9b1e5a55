"""An HTTP/1.1 server for the paths that must cost least; the edge is its only client.

Around each request happens what `libs.rpc.interceptors` does around an RPC: a span, metrics, one
log line, and whatever is raised becomes a `google.rpc.Status`: a handler's in JSON, under the HTTP
status of its code, a method's as in gRPC.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from http import HTTPStatus
from typing import Any

import structlog
from aiohttp import web
from google.protobuf import json_format
from opentelemetry import trace

from libs.clock import Clock
from libs.errors import HeadraceError, InvalidArgument, Unimplemented
from libs.http.exchange import CALLER_GONE, Exchange, has_gone
from libs.http.grpc_method import GrpcMethod, TrailedWriter
from libs.rpc.framing import PREFIX
from libs.rpc.handling import MAX_REQUEST_BYTES
from libs.rpc.status import as_headrace_error, to_status
from libs.telemetry import http_metrics
from libs.telemetry.tracing import server_span

_log = structlog.get_logger()
_tracer = trace.get_tracer("headrace.http")

HEALTH_PATH = "/healthz"
# The edge lets more pass than aiohttp does by default.
_MAX_FIELD_BYTES = 64 * 1024
_MAX_HEADERS = 256
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
    "CANCELLED": 499,
    "INTERNAL": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}

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
        methods: Iterable[GrpcMethod] = (),
        is_ready: Callable[[], bool],
        drain_seconds: float,
        clock: Clock,
    ) -> None:
        self.address = address
        self._handlers = dict(handlers)
        self._methods = {method.name: method for method in methods}
        self._is_ready = is_ready
        self._drain_seconds = drain_seconds
        self._clock = clock
        self._runner: web.ServerRunner | None = None
        self._running: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Binds and serves.

        Raises:
            OSError: the address cannot be bound.
        """
        server = web.Server(
            self._answer,
            request_factory=self._request,
            handler_cancellation=True,  # a caller that goes away ends what runs for it
            access_log=None,
            auto_decompress=False,  # a body that is no JSON is told so, however it is packed
            max_line_size=_MAX_FIELD_BYTES,
            max_field_size=_MAX_FIELD_BYTES,
            max_headers=_MAX_HEADERS,
        )
        # aiohttp waits twice: for the handler, and again before it cancels it.
        self._runner = web.ServerRunner(
            server, handle_signals=False, shutdown_timeout=self._drain_seconds / 2
        )
        await self._runner.setup()
        host, _, port = self.address.rpartition(":")
        await web.TCPSite(self._runner, host, int(port), backlog=_BACKLOG).start()
        self.address = f"{host}:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Accepts no more connections, lets running requests end for a time, then cancels them."""
        if self._runner is not None:
            await self._runner.cleanup()
        if self._running:  # cancelled now: what they used is still to be written down
            await asyncio.wait(self._running, timeout=_CANCELLED_SECONDS)

    def _request(
        self, message: Any, payload: Any, protocol: Any, _writer: Any, task: Any
    ) -> web.BaseRequest:
        """Makes a request as aiohttp does, but with a longer body, and trailers in its answer."""
        loop = asyncio.get_running_loop()
        writer = TrailedWriter(protocol, loop)
        prefix = PREFIX.size if message.path in self._methods else 0
        limit = MAX_REQUEST_BYTES + prefix
        return web.BaseRequest(
            message, payload, protocol, writer, task, loop, client_max_size=limit
        )

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        if path == HEALTH_PATH:
            healthy = HTTPStatus.OK if self._is_ready() else HTTPStatus.SERVICE_UNAVAILABLE
            return web.Response(status=healthy)
        answer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
        if request.method != "POST":
            return _no_such_path()
        if (method := self._methods.get(path)) is not None:
            name, answer = path.removeprefix("/"), method.answer
        elif (handler := self._handlers.get(path)) is not None:
            name, answer = f"POST {path}", partial(self._told, path, handler)
        else:
            return _no_such_path()
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # a coroutine runs in a task
        self._running.add(task)
        try:
            with server_span(_tracer, name, traceparent=request.headers.get("traceparent")):
                return await answer(request)
        finally:
            self._running.discard(task)

    async def _told(
        self, path: str, handler: Handler, request: web.BaseRequest
    ) -> web.StreamResponse:
        """Handles a request and tells metrics, span and log how it ended."""
        started = self._clock.monotonic_seconds()
        status = CALLER_GONE
        try:
            response, status = await _handled(handler, request)
            return response
        finally:
            seconds = self._clock.monotonic_seconds() - started
            http_metrics.handled(path, status, seconds)
            span = trace.get_current_span()
            if span.is_recording():
                span.set_attributes(
                    {
                        "http.request.method": "POST",
                        "http.route": path,
                        "http.response.status_code": status,
                    }
                )
                if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                    span.set_status(trace.StatusCode.ERROR)
            # What went well is in the metrics, the edge's access log and the handler's own line.
            if status != HTTPStatus.OK:
                _log.info("http", path=path, status=status, duration_seconds=round(seconds, 6))


async def _handled(handler: Handler, request: web.BaseRequest) -> tuple[web.StreamResponse, int]:
    """Returns the answer, and the status that stands for what happened, if it came too late."""
    exchange: Exchange | None = None
    try:
        exchange = Exchange(request, await _body(request))
        await handler(exchange)
    except Exception as raised:  # noqa: BLE001  # the boundary: everything becomes a status
        response = exchange.response if exchange else None
        if isinstance(raised, ConnectionError) and has_gone(request):
            return response or web.Response(status=CALLER_GONE), CALLER_GONE
        error = as_headrace_error(raised)
        status = _HTTP_STATUSES[error.code]
        if response is None or not response.prepared:
            return _failure(error), status
        # Too late for a status. Of its own errors a handler has told; what nobody foresaw cuts the
        # answer, so that it does not look complete.
        if error is not raised and request.transport is not None:
            request.transport.abort()
        return response, status
    assert exchange.response is not None  # noqa: S101  # a handler answers or raises
    return exchange.response, exchange.response.status


async def _body(request: web.BaseRequest) -> bytes:
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        text = f"longer than {MAX_REQUEST_BYTES} bytes"
        raise InvalidArgument.too_large("body", text, limit_bytes=MAX_REQUEST_BYTES) from error


def _no_such_path() -> web.Response:
    return _failure(Unimplemented("no such path", reason="METHOD_NOT_FOUND"))


def _failure(error: HeadraceError) -> web.Response:
    return web.Response(
        status=_HTTP_STATUSES[error.code],
        text=json_format.MessageToJson(
            to_status(error), preserving_proto_field_name=True, indent=None
        ),
        content_type="application/json",
    )
