"""The `Date` header of responses."""

from __future__ import annotations

from email.utils import format_datetime

from libs.clock import Clock

REFRESH_SECONDS = 1.0


class DateHeader:
    """Formats the header once a second: to do it for each response would cost more than it says."""

    __slots__ = ("_clock", "_line", "_valid_until_seconds")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._line = ""
        self._valid_until_seconds = float("-inf")

    def line(self) -> str:
        """Returns the header line with its line break."""
        now = self._clock.monotonic_seconds()
        if now >= self._valid_until_seconds:
            self._valid_until_seconds = now + REFRESH_SECONDS
            self._line = f"date: {format_datetime(self._clock.now(), usegmt=True)}\r\n"
        return self._line
