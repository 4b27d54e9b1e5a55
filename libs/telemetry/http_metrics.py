"""HTTP server metrics, with the names of OpenTelemetry."""

from __future__ import annotations

from prometheus_client import Histogram

# The boundaries of the semantic conventions, and smaller ones.
LATENCY_BUCKETS_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 60,
)  # fmt: skip

REQUEST_DURATION = Histogram(
    "http_server_request_duration_seconds",
    "Time from a request to its last byte.",
    ["http_route", "http_response_status_code"],
    buckets=LATENCY_BUCKETS_SECONDS,
)

_handled: dict[tuple[str, int], Histogram] = {}


def handled(route: str, status: int, seconds: float) -> None:
    """Records a request that ended.

    Args:
        route: a served route; others would grow without limit.
        status: status of the response; 499 if the caller closed the connection before.
        seconds: duration.
    """
    child = _handled.get((route, status))
    if child is None:
        child = _handled[route, status] = REQUEST_DURATION.labels(route, str(status))
    child.observe(seconds)
