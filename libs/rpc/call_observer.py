"""What happens around a call on the server's side, whatever carries it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import structlog

from libs.clock import Clock
from libs.errors import DeadlineExceeded, InvalidArgument
from libs.telemetry import rpc_metrics

_log = structlog.get_logger()

# The callee keeps this much of the deadline back, so that it can still say what timed out.
DEADLINE_MARGIN_SECONDS = 0.020
# What a request may have. gRPC itself lets more pass, so that we can answer with `ErrorInfo`.
MAX_REQUEST_BYTES = 4 * 1024 * 1024

T = TypeVar("T")


class CallObserver:
    """One call, from its begin to its end, for metrics and log."""

    def __init__(self, method: str, clock: Clock) -> None:
        """Counts a call of `/package.Service/Method` that begins."""
        self._method = method
        self._clock = clock
        self._started_seconds = clock.monotonic_seconds()
        rpc_metrics.started(method)

    def end(self, status: str) -> None:
        """Records the end, with its status code's name, such as `OK`."""
        seconds = self._clock.monotonic_seconds() - self._started_seconds
        rpc_metrics.handled(self._method, status, seconds)
        # What went well is in the metrics, the edge's access log and the servicer's own line.
        log = _log.debug if status == "OK" else _log.info
        log("rpc", method=self._method, status=status, duration_seconds=round(seconds, 6))


async def within_deadline(work: Awaitable[T], remaining_seconds: float | None) -> T:
    """Returns what the work does, if it is done in time; None: it may take its time.

    Raises:
        DeadlineExceeded: it is not.
    """
    if remaining_seconds is None:
        return await work
    limit = asyncio.timeout(max(0.0, remaining_seconds - DEADLINE_MARGIN_SECONDS))
    try:
        async with limit:
            return await work
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineExceeded(
            "the deadline passed before the work was done", reason="DEADLINE_EXCEEDED"
        ) from error


def check_size(request: object) -> None:
    """Returns if a message is one that a caller may send.

    Raises:
        InvalidArgument: it is too large.
    """
    size = getattr(request, "ByteSize", None)
    if size is not None and size() > MAX_REQUEST_BYTES:
        text = f"the message has {size()} bytes, more than {MAX_REQUEST_BYTES}"
        raise InvalidArgument.too_large("", text, limit_bytes=MAX_REQUEST_BYTES)
