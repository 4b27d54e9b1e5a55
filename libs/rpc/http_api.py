"""The application of a service's HTTP server: routes, gRPC methods over HTTP/1.1, and health.

The edge is its only client.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from libs.clock import Clock
from libs.errors import HeadraceError, InvalidArgument, Unavailable, Unimplemented
from libs.http1 import Exchange
from libs.rpc.call_observer import HttpObserver
from libs.rpc.deadlines import Deadlines
from libs.rpc.framing import PREFIX
from libs.rpc.grpc_http1 import GrpcHttp1Handler
from libs.rpc.http_call import JSON_TYPE, Handler, HttpCall
from libs.rpc.http_dialect import HTTP_STATUSES, HttpDialect, StatusDialect
from libs.rpc.served_call import MAX_REQUEST_BYTES, serve_call

HEALTH_PATH = "/healthz"
NOT_READY_RETRY_SECONDS = 1.0
# As long as the edge lets calls run.
LONGEST_CALL_SECONDS = 600.0

# Headers of the mesh and of its clients: each holds one value, so a second one contradicts it.
_SINGLE_PREFIXES = ("x-headrace-", "x-envoy-", "x-stainless-", "grpc-")
_SINGLE_HEADERS = frozenset({"traceparent"})
_LISTS = frozenset({"grpc-accept-encoding"})

Serve = Callable[[Exchange], Awaitable[None]]


@dataclass(frozen=True)
class HttpRoute:
    """One kind of request.

    Attributes:
        method: such as `POST`.
        path: such as `/v1/models`, or with one parameter at its end, `/v1/models/{model}`, which
            stands for all the rest of a path and may contain slashes.
        handler: answers it.
        scope: what the caller must have; see `libs.rpc.access`.
    """

    method: str
    path: str
    handler: Handler
    scope: str


class HttpApi:
    """Answers the requests of an `HttpServer`."""

    def __init__(
        self,
        *,
        routes: Iterable[HttpRoute] = (),
        grpc_methods: Iterable[GrpcHttp1Handler] = (),
        is_ready: Callable[[], bool],
        clock: Clock,
        dialect: HttpDialect | None = None,
        longest_call_seconds: float = LONGEST_CALL_SECONDS,
    ) -> None:
        """Creates the application.

        Args:
            routes: the kinds of HTTP requests.
            grpc_methods: the methods that are served as gRPC over HTTP/1.1.
            is_ready: what health checks report.
            clock: the time.
            dialect: how the routes write errors. None: as `google.rpc.Status` in JSON.
            longest_call_seconds: the deadline of requests whose caller names none or a later one.
        """
        self._is_ready = is_ready
        self._clock = clock
        self._deadlines = Deadlines()
        self._dialect = dialect or StatusDialect()
        self._longest_call_seconds = longest_call_seconds
        self._exact: dict[tuple[str, str], Serve] = {}
        self._with_parameter: list[tuple[str, str, Callable[[Exchange, str], Awaitable[None]]]] = []
        self._body_limits: dict[str, int] = {}
        for method in grpc_methods:
            self._exact["POST", method.name] = method.answer
            self._body_limits[method.name] = PREFIX.size + MAX_REQUEST_BYTES
        for route in routes:
            self._add(route)

    async def answer(self, exchange: Exchange) -> None:
        """Answers a request."""
        request = exchange.request
        serve = self._exact.get((request.method, request.path))
        if serve is not None:
            await serve(exchange)
            return
        for method, prefix, serve_parameter in self._with_parameter:
            if request.method == method and request.path.startswith(prefix):
                await serve_parameter(exchange, request.path.removeprefix(prefix))
                return
        if request.violation:
            self._refuse(exchange, InvalidArgument(request.violation, reason="INVALID_FIELD"))
        elif request.path == HEALTH_PATH:
            self._answer_health(exchange)
        else:
            self._refuse(exchange, Unimplemented("no such path", reason="METHOD_NOT_FOUND"))

    def max_body_bytes(self, path: str) -> int:
        """Returns the longest body that requests to a path may have."""
        return self._body_limits.get(path, MAX_REQUEST_BYTES)

    def is_single_header(self, name: str) -> bool:
        """Returns whether a header of the mesh may occur only once in a request."""
        return name in _SINGLE_HEADERS or (name.startswith(_SINGLE_PREFIXES) and name not in _LISTS)

    def _add(self, route: HttpRoute) -> None:
        observer = HttpObserver(route.method, route.path)

        async def serve(exchange: Exchange, tail: str = "") -> None:
            call = HttpCall(
                exchange,
                route.handler,
                tail=tail,
                dialect=self._dialect,
                longest_seconds=self._longest_call_seconds,
                deadlines=self._deadlines,
                clock=self._clock,
            )
            await serve_call(call, observer, self._clock, scope=route.scope)

        prefix, brace, _ = route.path.partition("{")
        if brace:
            self._with_parameter.append((route.method, prefix, serve))
        else:
            self._exact[route.method, route.path] = serve

    def _answer_health(self, exchange: Exchange) -> None:
        if self._is_ready():
            exchange.respond(b"", content_type="text/plain")
            return
        error = Unavailable(
            "the service is not ready: it is starting or stopping, or has no routes yet",
            reason="DEPENDENCY_UNAVAILABLE",
            metadata={"dependency": "routes"},
            retry_after_seconds=NOT_READY_RETRY_SECONDS,
        )
        body = StatusDialect().error_body(error)  # as the edge's own answers on this path
        exchange.respond(body, content_type=JSON_TYPE, status=HTTP_STATUSES[error.code])

    def _refuse(self, exchange: Exchange, error: HeadraceError) -> None:
        exchange.respond(
            self._dialect.error_body(error),
            content_type=JSON_TYPE,
            status=HTTP_STATUSES[error.code],
        )
