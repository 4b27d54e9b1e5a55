"""Records calls of all protocols: metrics, span attributes, a log line."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import grpc
import structlog
from opentelemetry import trace
from typing_extensions import override

from libs.rpc.http_dialect import HTTP_STATUSES
from libs.telemetry import http_metrics, rpc_metrics

_log = structlog.get_logger()

# Defined by the semantic conventions of OpenTelemetry for servers.
_SERVER_FAULTS = frozenset({"INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNIMPLEMENTED"})


class CallObserver(ABC):
    """Records the calls of one method or route; there is one for all calls of it.

    Attributes:
        span_name: name of the server span; empty: calls have no span.
    """

    span_name: str

    @abstractmethod
    def started(self) -> None:
        """Counts a call that starts."""

    @abstractmethod
    def measure(self, code: str, seconds: float) -> None:
        """Updates the metrics of calls that ended."""

    @abstractmethod
    def log(self, code: str, seconds: float) -> None:
        """Writes the log line of a call that ended."""

    @abstractmethod
    def attributes(self, code: str) -> Mapping[str, str | int]:
        """Returns the span's attributes."""

    def ended(self, code: str, seconds: float) -> None:
        """Records the end of a call, with the name of its status code, such as `OK`."""
        self.measure(code, seconds)
        span = trace.get_current_span()
        if span.is_recording() and self.span_name:
            span.set_attributes(self.attributes(code))
            if code in _SERVER_FAULTS:
                span.set_status(trace.StatusCode.ERROR)
        self.log(code, seconds)


class GrpcObserver(CallObserver):
    """Records calls of a gRPC method."""

    def __init__(self, method: str, *, traced: bool = True) -> None:
        """Creates the observer of `/package.Service/Method`."""
        self.span_name = method.removeprefix("/") if traced else ""
        self._method = method

    @override
    def started(self) -> None:
        rpc_metrics.started(self._method)

    @override
    def measure(self, code: str, seconds: float) -> None:
        rpc_metrics.handled(self._method, code, seconds)

    @override
    def log(self, code: str, seconds: float) -> None:
        if code == "OK" and not self.span_name:  # health checks, each second
            return
        # Successful calls are in the metrics, the edge's access log and the servicer's own line.
        log = _log.debug if code == "OK" else _log.info
        log("rpc", method=self._method, status=code, duration_seconds=round(seconds, 6))

    @override
    def attributes(self, code: str) -> Mapping[str, str | int]:
        service, _, method = self._method.removeprefix("/").rpartition("/")
        return {
            "rpc.system": "grpc",
            "rpc.service": service,
            "rpc.method": method,
            "rpc.grpc.status_code": grpc.StatusCode[code].value[0],
        }


class HttpObserver(CallObserver):
    """Records requests to an HTTP route."""

    def __init__(self, method: str, route: str) -> None:
        """Creates the observer of a route such as `GET /v1/models/{model}`."""
        self.span_name = f"{method} {route}"
        self._method = method
        self._route = route

    @override
    def started(self) -> None:
        pass  # the semantic conventions count requests when they end

    @override
    def measure(self, code: str, seconds: float) -> None:
        http_metrics.handled(self._route, HTTP_STATUSES[code], seconds)

    @override
    def log(self, code: str, seconds: float) -> None:
        if code != "OK":
            status = HTTP_STATUSES[code]
            _log.info("http", path=self._route, status=status, duration_seconds=round(seconds, 6))

    @override
    def attributes(self, code: str) -> Mapping[str, str | int]:
        return {
            "http.request.method": self._method,
            "http.route": self._route,
            "http.response.status_code": HTTP_STATUSES[code],
        }
