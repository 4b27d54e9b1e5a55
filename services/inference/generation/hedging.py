"""Hedging: if the first token is late, a second backend gets the same request.

The first of the two that sends a chunk continues, the other is cancelled: the reader sees one
answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from services.inference.backends.chat import ChunkSink
from services.inference.domain import BackendFailedError, Chunk, Delivered, Finish

# How many unused hedges are saved for later.
MAX_SAVED_HEDGES = 10.0


@dataclass(frozen=True, kw_only=True)
class HedgeLimits:
    """When a second backend is called.

    Attributes:
        after_seconds: how long the first one has for its first token. 0: hedging is off.
        max_share: the largest share of all requests that is hedged.
    """

    after_seconds: float = 0.0
    max_share: float = 0.05


class HedgeBudget:
    """Limits hedges to a share of the requests, so that a slow pool does not get twice the work."""

    def __init__(self, limits: HedgeLimits) -> None:
        self._limits = limits
        self._saved = 0.0

    def count_request(self) -> None:
        """Adds one request's share of a hedge."""
        self._saved = min(MAX_SAVED_HEDGES, self._saved + self._limits.max_share)

    def take(self) -> bool:
        """Returns whether another hedge is allowed, and counts it."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True


class HedgeAttempt:
    """The sink of one backend. Its chunks pass if it is the first backend with a chunk.

    Attributes:
        backend: its id.
        delivered: what it has put in.
    """

    def __init__(
        self, call: HedgedCall, *, backend: str, delivered: Delivered, on_first: Callable[[], None]
    ) -> None:
        self.backend = backend
        self.delivered = delivered
        self._call = call
        self._on_first = on_first
        self._started = False

    @property
    def full(self) -> bool:
        """Whether to wait for `room` before the next chunk."""
        return self._call.sink.full

    def put(self, chunk: Chunk) -> None:
        """Adds a chunk; it is dropped if another backend was first."""
        if not self._started:
            self._started = True
            self._on_first()
            self._call.start(self)
        if self._call.winner is self:
            self._call.sink.put(chunk)

    async def room(self) -> None:
        """Returns when another chunk may be added."""
        await self._call.sink.room()


class HedgedCall:
    """The attempts that compete for one answer: one, or two if the first was late.

    Attributes:
        sink: takes the winner's chunks.
        attempts: in the order in which they started.
        winner: the first with a chunk.
    """

    def __init__(self, sink: ChunkSink, *, on_winner: Callable[[HedgeAttempt], None]) -> None:
        self.sink = sink
        self.attempts: list[HedgeAttempt] = []
        self.winner: HedgeAttempt | None = None
        self._on_winner = on_winner
        self._tasks: list[asyncio.Task[Finish]] = []
        self._won: asyncio.Future[asyncio.Task[Finish] | None] | None = None

    def attempt(
        self, *, backend: str, delivered: Delivered, on_first: Callable[[], None]
    ) -> HedgeAttempt:
        """Adds an attempt.

        Args:
            backend: its id.
            delivered: what the backend puts in is added here, by the backend's client.
            on_first: called with its first chunk.
        """
        attempt = HedgeAttempt(self, backend=backend, delivered=delivered, on_first=on_first)
        self.attempts.append(attempt)
        return attempt

    def start(self, attempt: HedgeAttempt) -> None:
        """Called when an attempt has its first chunk: if none was before it, the others end."""
        if self.winner is not None:
            return
        self.winner = attempt
        self._on_winner(attempt)
        if self._won is None:
            return
        winning = next(task for task in self._tasks if task is asyncio.current_task())
        self._won.set_result(winning)
        for task in self._tasks:
            if task is not winning:
                task.cancel()

    async def run(
        self,
        attempt: Callable[[], Coroutine[Any, Any, Finish]],
        *,
        after_seconds: float,
        may_hedge: Callable[[], bool],
    ) -> Finish:
        """Runs an attempt, and a second one beside it if no chunk comes in time.

        Raises:
            BackendFailedError: all attempts failed.
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
                    continue  # it was second; it was cancelled, or failed in the meantime
                error = task.exception()
                if not isinstance(error, BackendFailedError):
                    return task.result()
                failed |= error.backends
                if not running or won.done():
                    error.backends = failed
                    raise error
