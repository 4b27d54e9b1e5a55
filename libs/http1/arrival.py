"""How slowly a request may arrive.

Without a limit, a client that sends a body byte by byte holds a connection and memory indefinitely.
"""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import Counter

TIMEOUTS = Counter(
    "headrace_http_requests_timed_out", "Requests that were ended because they arrived too slowly."
)


@dataclass(frozen=True)
class ArrivalLimits:
    """How long a server waits for the rest of a request.

    Attributes:
        idle_seconds: the longest pause, and the time before the rate matters.
        min_bytes_per_second: the lowest average rate after that.
    """

    idle_seconds: float = 15.0
    min_bytes_per_second: float = 1024.0

    def due_seconds(self, *, began_seconds: float, grew_seconds: float, size_bytes: int) -> float:
        """Returns when a request that has not arrived completely is ended.

        Args:
            began_seconds: when its first byte arrived.
            grew_seconds: when its last byte so far arrived, on the same clock.
            size_bytes: how much of it has arrived.
        """
        slowest = began_seconds + self.idle_seconds + size_bytes / self.min_bytes_per_second
        return min(grew_seconds + self.idle_seconds, slowest)
