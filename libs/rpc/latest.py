"""Publishes the newest value to many readers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Latest(Generic[T]):
    """Stores one value. Readers get the newest one; slow readers skip values.

    There is no queue, so a reader that stalls uses no memory.
    """

    def __init__(self) -> None:
        self._value: T | None = None
        self._number = 0
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def value(self) -> T | None:
        """The newest value; None before the first."""
        return self._value

    def publish(self, value: T) -> None:
        """Replaces the value and wakes the readers."""
        self._value = value
        self._number += 1
        self._wake()

    def close(self) -> None:
        """Ends all current and later readers, so that the process can drain."""
        self._closed = True
        self._wake()

    async def follow(self) -> AsyncIterator[T]:
        """Yields the newest value, if there is one, immediately, and each later one."""
        seen = 0
        while not self._closed:
            changed = self._changed
            if self._value is not None and self._number != seen:
                seen = self._number
                yield self._value
            else:
                await changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
