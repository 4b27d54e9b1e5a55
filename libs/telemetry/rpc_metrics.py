"""gRPC server metrics, with the names of gRPC proposal A66."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

# A66, "Histogram Bucket Boundaries".
LATENCY_BUCKETS_SECONDS = (
    0.00001, 0.00005, 0.0001, 0.0003, 0.0006, 0.0008, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006,
    0.008, 0.01, 0.013, 0.016, 0.02, 0.025, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.13, 0.16, 0.2,
    0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1, 2, 5, 10, 20, 50, 100,
)  # fmt: skip

CALL_STARTED = Counter(
    "grpc_server_call_started", "Calls that started, completed or not.", ["grpc_method"]
)
CALL_DURATION = Histogram(
    "grpc_server_call_duration_seconds",
    "Duration of calls.",
    ["grpc_method", "grpc_status"],
    buckets=LATENCY_BUCKETS_SECONDS,
)

_started: dict[str, Counter] = {}
_handled: dict[tuple[str, str], Histogram] = {}


def started(method: str) -> None:
    """Counts a call that starts.

    Args:
        method: `/package.Service/Method` of a registered method; others would grow without limit.
    """
    child = _started.get(method)
    if child is None:
        child = _started[method] = CALL_STARTED.labels(method.removeprefix("/"))
    child.inc()


def handled(method: str, status: str, seconds: float) -> None:
    """Records a call that ended, with the name of its status code, such as `OK`."""
    child = _handled.get((method, status))
    if child is None:
        child = CALL_DURATION.labels(method.removeprefix("/"), status)
        _handled[method, status] = child
    child.observe(seconds)
