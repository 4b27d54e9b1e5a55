"""How much work the backends of a deployment are given at once.

What a backend has received waits there in the order of arrival: nobody can get in between. So it
receives only as much as it needs to be busy, and the rest waits in the fair queue. How much that is
depends on the model and the machine; it is measured, as congestion control does (Brakmo and
Peterson, "TCP Vegas", IEEE JSAC 13(8), 1995): while requests wait, the window grows as long as
requests are done within the target, and shrinks where they take longer.
"""

from __future__ import annotations

import math

# How long a request may take that shares the backends with what was sent before it.
TARGET_SECONDS = 0.05
# Some backends take a while for any batch. The next one forms while one runs, so twice that time is
# needed. It is the shortest time of any request; one that is alone corrects it upwards, slowly.
TARGET_TO_FASTEST = 2.0
CORRECTION = 1.05
# How fast the window changes, as a share of the work that was done.
GAIN = 0.25
INITIAL_WORK = 1024
MIN_WORK = 64
MAX_WORK = 1 << 20


class WorkWindow:
    """Limits the work in flight, in tokens or another unit that all requests have.

    Attributes:
        limit: the most work in flight; one request always fits.
    """

    __slots__ = ("_fastest_seconds", "_in_flight", "_next_is_alone", "limit")

    def __init__(self) -> None:
        self.limit = float(INITIAL_WORK)
        self._in_flight = 0
        self._fastest_seconds = math.inf
        self._next_is_alone = False

    def fits(self, work: int) -> bool:
        """Returns whether a request may be sent now."""
        return not self._in_flight or self._in_flight + work <= self.limit

    def started(self, work: int) -> None:
        """Notes that a request was sent."""
        self._next_is_alone = not self._in_flight
        self._in_flight += work

    def ended(self, work: int) -> None:
        """Notes that a request ended."""
        self._in_flight -= work

    def learn(self, work: int, seconds: float, *, others_wait: bool) -> None:
        """Adapts the window to a request that was answered, before `ended`."""
        if self._next_is_alone:  # nothing was sent after it either
            self._fastest_seconds *= CORRECTION
        self._fastest_seconds = min(self._fastest_seconds, seconds)
        if not others_wait:  # more work in flight would not have helped
            return
        target = max(TARGET_SECONDS, TARGET_TO_FASTEST * self._fastest_seconds)
        change = max(-1.0, min(1.0, 1.0 - seconds / target))
        self.limit = max(MIN_WORK, min(MAX_WORK, self.limit + GAIN * work * change))
