"""Keeps what Triton says about models: a version never changes, and its calls cost no slot."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import NamedTuple
from weakref import WeakValueDictionary

from libs.clock import Clock
from services.inference.deadlines import deadline_exceeded, seconds_left

MAX_DESCRIPTIONS = 256
MAX_BYTES = 16 * 1024**2


class Key(NamedTuple):
    """What is described, and by which method of the protocol."""

    deployment: str
    model_version: str
    artifact_digest: str
    method: str


class Descriptions:
    """The descriptions that were asked for last. Callers of one at the same time ask Triton once.

    Errors are not kept.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: OrderedDict[Key, bytes] = OrderedDict()
        self._size_bytes = 0
        # Each exists while a caller holds it or waits for it.
        self._locks: WeakValueDictionary[Key, asyncio.Lock] = WeakValueDictionary()

    async def get(
        self, key: Key, ask: Callable[[], Awaitable[bytes]], *, deadline_seconds: float | None
    ) -> bytes:
        """Returns a description; asks for one that is not known.

        Args:
            key: of the description.
            ask: returns it.
            deadline_seconds: when the caller gives up, on the clock's monotonic time.

        Raises:
            DeadlineExceeded: another caller still asks for it.
            HeadraceError: as `ask`.
        """
        if (known := self._find(key)) is not None:
            return known
        lock = self._locks.setdefault(key, asyncio.Lock())
        left = seconds_left(deadline_seconds, self._clock, waiting_for="backend")
        try:
            async with asyncio.timeout(left):
                await lock.acquire()
        except TimeoutError as error:
            raise deadline_exceeded("backend") from error
        try:
            if (known := self._find(key)) is None:
                known = await ask()
                self._add(key, known)
            return known
        finally:
            lock.release()

    def _find(self, key: Key) -> bytes | None:
        if key in self._known:
            self._known.move_to_end(key)
        return self._known.get(key)

    def _add(self, key: Key, description: bytes) -> None:
        self._known[key] = description
        self._size_bytes += len(description)
        while len(self._known) > MAX_DESCRIPTIONS or self._size_bytes > MAX_BYTES:
            _, oldest = self._known.popitem(last=False)
            self._size_bytes -= len(oldest)
