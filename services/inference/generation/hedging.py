"""A hedged first token: where the first backend is late, a second one is asked for the same.

The first of them with a piece goes on to the end, the other is cancelled: the reader sees one
answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from services.inference.domain import BackendFailedError, Chunk, Delivered, Finish
from services.inference.generation.relay import ChunkSink

# Hedges that quiet times leave for busy ones.
MAX_SAVED_HEDGES = 10.0


@dataclass(frozen=True, kw_only=True)
class HedgeLimits:
    """When a second backend is asked.

    Attributes:
        after_seconds: the first one has this long for its first token. 0: no second one is asked.
        max_share: of all requests, at most this share is hedged.
    """

    after_seconds: float = 0.0
    max_share: float = 0.05


class HedgeBudget:
    """Counts requests and hedges, so that a slow pool is not asked for twice the work."""

    def __init__(self, limits: HedgeLimits) -> None:
        self._limits = limits
        self._saved = 0.0

    def count_request(self) -> None:
        """Each request earns a share of a hedge."""
        self._saved = min(MAX_SAVED_HEDGES, self._saved + self._limits.max_share)

    def take(self) -> bool:
        """Returns whether another hedge may be made, which is then counted."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True


class HedgeAttempt:
    """One backend's way to the reader. It opens with its first piece, unless another one's has.

    Attributes:
        backend: its id.
        delivered: what it has put in.
    """

    def __init__(
        self, race: HedgedCall, *, backend: str, delivered: Delivered, works: Callable[[], None]
    ) -> None:
        self.backend = backend
        self.delivered = delivered
        self._race = race
        self._works = works
        self._begun = False

    @property
    def full(self) -> bool:
        """Whether to wait for `room` before the next piece."""
        return self._race.relay.full

    def put(self, piece: Chunk) -> None:
        """Adds a piece; those of a backend that came second go nowhere."""
        if not self._begun:
            self._begun = True
            self._works()
            self._race.begin(self)
        if self._race.winner is self:
            self._race.relay.put(piece)

    async def room(self) -> None:
        """Returns when another piece may be added."""
        await self._race.relay.room()


class HedgedCall:
    """The lanes of one attempt: one, or two where the first was late.

    Attributes:
        relay: where the winner's pieces go.
        lanes: in the order in which they started.
        winner: the first with a piece.
    """

    def __init__(self, relay: ChunkSink, *, on_begin: Callable[[HedgeAttempt], None]) -> None:
        self.relay = relay
        self.lanes: list[HedgeAttempt] = []
        self.winner: HedgeAttempt | None = None
        self._on_begin = on_begin
        self._tasks: list[asyncio.Task[Finish]] = []
        self._won: asyncio.Future[asyncio.Task[Finish] | None] | None = None

    def lane(
        self, *, backend: str, delivered: Delivered, works: Callable[[], None]
    ) -> HedgeAttempt:
        """Adds a lane.

        Args:
            backend: its id.
            delivered: what it puts in is added here.
            works: is called with its first piece.
        """
        lane = HedgeAttempt(self, backend=backend, delivered=delivered, works=works)
        self.lanes.append(lane)
        return lane

    def begin(self, lane: HedgeAttempt) -> None:
        """Tells that a lane has its first piece: if it is the first, the others end."""
        if self.winner is not None:
            return
        self.winner = lane
        self._on_begin(lane)
        if self._won is None:
            return
        ours = next(task for task in self._tasks if task is asyncio.current_task())
        self._won.set_result(ours)
        for task in self._tasks:
            if task is not ours:
                task.cancel()

    async def run(
        self,
        attempt: Callable[[], Coroutine[Any, Any, Finish]],
        *,
        after_seconds: float,
        may_hedge: Callable[[], bool],
    ) -> Finish:
        """Runs an attempt, and another one beside it where no piece comes in time.

        Raises:
            BackendFailedError: all that ran failed.
            HeadraceError: one of them refuses the request.
        """
        self._won = asyncio.get_running_loop().create_future()
        self._tasks.append(asyncio.create_task(attempt()))
        try:
            await asyncio.wait(
                [self._won, *self._tasks],  # type: ignore[type-var]  # any futures
                timeout=after_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not (self._won.done() or self._tasks[0].done()) and may_hedge():
                self._tasks.append(asyncio.create_task(attempt()))
            return await self._first_result(self._won)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _first_result(self, won: asyncio.Future[asyncio.Task[Finish] | None]) -> Finish:
        failed: frozenset[str] = frozenset()
        running = set(self._tasks)
        while True:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if won.done() and task is not won.result():
                    continue  # it came second, and was cancelled or failed meanwhile
                error = task.exception()
                if not isinstance(error, BackendFailedError):
                    return task.result()
                failed |= error.backends
                if not running or won.done():
                    error.backends = failed
                    raise error
