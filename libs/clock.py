"""A clock that is passed as an argument, so that tests can control the time."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Returns the time and sleeps."""

    def now(self) -> datetime:
        """Returns the wall time in UTC."""

    def monotonic_seconds(self) -> float:
        """Returns seconds from a fixed, unknown start; never goes back."""

    async def sleep(self, seconds: float) -> None:
        """Sleeps."""


class SystemClock:
    """The clock of the machine."""

    def now(self) -> datetime:
        """Returns the wall time in UTC."""
        return datetime.now(UTC)

    def monotonic_seconds(self) -> float:
        """Returns seconds from a fixed, unknown start; never goes back."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Sleeps."""
        await asyncio.sleep(seconds)
