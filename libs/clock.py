"""The time, as an argument."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Tells the time and lets it pass."""

    def now(self) -> datetime:
        """Returns the wall time in UTC."""

    def monotonic_seconds(self) -> float:
        """Returns seconds from a fixed, unknown start; never goes back."""

    async def sleep(self, seconds: float) -> None:
        """Lets so much time pass."""


class SystemClock:
    """The machine's own clock."""

    def now(self) -> datetime:
        """Returns the wall time in UTC."""
        return datetime.now(UTC)

    def monotonic_seconds(self) -> float:
        """Returns seconds from a fixed, unknown start; never goes back."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Lets so much time pass."""
        await asyncio.sleep(seconds)
