"""How much work the backends of a deployment get at a time.

What a backend has received waits there in the order of arrival, which is not fair. So it
receives only as much as it needs to be busy, and the rest waits in the fair queue. How much that is
depends on the model and the machine; it is measured, as congestion control by delay does (Brakmo
and Peterson, "TCP Vegas", IEEE JSAC 13(8), 1995): while requests wait, the window grows as long as
requests are done within the target, and shrinks where they take longer.
"""

from __future__ import annotations

# How long a request may take that shares the backends with what was sent before it.
DEFAULT_TARGET_SECONDS = 0.05
# How fast the window changes, as a share of the work that was done.
GAIN = 0.25
MIN_WORK = 256
MAX_WORK = 1 << 20


class WorkWindow:
    """Limits the work in flight, in tokens or another unit that all requests have.

    Attributes:
        limit: the most work in flight; one request always fits.
    """

    __slots__ = ("_in_flight", "_target_seconds", "limit")

    def __init__(self, target_seconds: float = DEFAULT_TARGET_SECONDS) -> None:
        self.limit = float(MIN_WORK)
        self._target_seconds = target_seconds
        self._in_flight = 0

    def fits(self, work: int) -> bool:
        """Returns whether a request may be sent now."""
        return not self._in_flight or self._in_flight + work <= self.limit

    def started(self, work: int) -> None:
        """Notes that a request was sent."""
        self._in_flight += work

    def ended(self, work: int) -> None:
        """Notes that a request ended."""
        self._in_flight -= work

    def learn(self, work: int, seconds: float) -> None:
        """Adapts the window to a request that was answered while others waited."""
        change = max(-1.0, min(1.0, 1.0 - seconds / self._target_seconds))
        self.limit = max(MIN_WORK, min(MAX_WORK, self.limit + GAIN * work * change))
