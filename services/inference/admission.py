"""Who may go to the backends now: a bounded queue a deployment, ordered by deadline, then priority.

A request that would wait past its deadline is refused at once: it is never left to time out. The
wait is estimated from the mean time that requests hold a place (an exponential average), the
places, and the requests ahead.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from dataclasses import dataclass, field

from prometheus_client import Gauge

from libs.clock import Clock
from libs.errors import ResourceExhausted
from libs.routes import Choice

_WAITING = Gauge("headrace_inference_waiting_requests", "Requests in the queue.", ["deployment"])

# Of a backend whose version does not say.
DEFAULT_CONCURRENT_REQUESTS = 256
# So many requests wait for each place at most.
MAX_WAITING_PER_PLACE = 16
# The weight of the newest service time in the average.
SMOOTHING = 0.1


@dataclass(order=True)
class _Waiting:
    deadline_seconds: float
    negative_priority: int
    number: int
    admitted: asyncio.Future[None] = field(compare=False)


class Queue:
    """The queue of one deployment."""

    def __init__(self, deployment: str, clock: Clock) -> None:
        self._deployment = deployment
        self._clock = clock
        self._places = 1
        self._running = 0
        self._held_seconds = 0.0
        self._waiting: list[_Waiting] = []
        self._numbers = itertools.count()
        self._gauge = _WAITING.labels(deployment)

    def place(self, *, places: int, deadline_seconds: float | None, priority: int) -> Slot:
        """Returns what holds a place while an `async with` runs; it waits for one, if it must.

        Args:
            places: how many there are now.
            deadline_seconds: when the caller gives up, on the clock's monotonic time.
            priority: among equal deadlines the highest goes first.

        Raises:
            ResourceExhausted: by the block; the queue is full (`QUEUE_FULL`), or the wait would be
                too long.
        """
        deadline = math.inf if deadline_seconds is None else deadline_seconds
        return Slot(self, places, deadline, priority)

    async def take(self, places: int, deadline_seconds: float, priority: int) -> float:
        """Takes a place and returns when that was. Whoever takes one gives it back.

        Raises:
            ResourceExhausted: see `place`.
        """
        self._places = places
        if self._running >= places or self._waiting:
            await self._wait(deadline_seconds, priority)
        else:
            self._running += 1
        return self._clock.monotonic_seconds()

    def give_back(self, taken_seconds: float) -> None:
        """Lets the next one have the place that was taken then."""
        held = self._clock.monotonic_seconds() - taken_seconds
        weight = SMOOTHING if self._held_seconds else 1.0
        self._held_seconds += weight * (held - self._held_seconds)
        self._running -= 1
        if self._waiting:
            self._admit()

    def wait_seconds(self, ahead: int) -> float:
        """Returns the estimated wait behind so many requests."""
        return (ahead + 1) * self._held_seconds / self._places

    async def _wait(self, deadline_seconds: float, priority: int) -> None:
        waiting = _Waiting(
            deadline_seconds,
            -priority,
            next(self._numbers),
            asyncio.get_running_loop().create_future(),
        )
        ahead = sum(other < waiting for other in self._waiting)
        wait = self.wait_seconds(ahead)
        if len(self._waiting) >= MAX_WAITING_PER_PLACE * self._places:
            raise self._refused("its queue is full", wait)
        if self._clock.monotonic_seconds() + wait > deadline_seconds:
            raise self._refused("the wait would pass the deadline", wait)
        heapq.heappush(self._waiting, waiting)
        self._gauge.set(len(self._waiting))
        try:
            await waiting.admitted
        except asyncio.CancelledError:
            if waiting.admitted.done() and not waiting.admitted.cancelled():
                self._running -= 1  # admitted and cancelled at the same moment
            else:
                self._waiting.remove(waiting)
                heapq.heapify(self._waiting)
            self._admit()
            raise

    def _admit(self) -> None:
        while self._waiting and self._running < self._places:
            waiting = heapq.heappop(self._waiting)
            if not waiting.admitted.done():
                self._running += 1
                waiting.admitted.set_result(None)
        self._gauge.set(len(self._waiting))

    def _refused(self, why: str, wait_seconds: float) -> ResourceExhausted:
        return ResourceExhausted(
            f"{self._deployment} is busy: {why}",
            reason="QUEUE_FULL",
            metadata={
                "queue": self._deployment,
                "limit": str(MAX_WAITING_PER_PLACE * self._places),
            },
            retry_after_seconds=max(wait_seconds, 0.1),
        )


class Slot:
    """Holds a place while a block runs. A class, since every request passes here."""

    __slots__ = ("_deadline_seconds", "_places", "_priority", "_queue", "_taken_seconds")

    def __init__(self, queue: Queue, places: int, deadline_seconds: float, priority: int) -> None:
        self._queue = queue
        self._places = places
        self._deadline_seconds = deadline_seconds
        self._priority = priority
        self._taken_seconds = 0.0

    async def __aenter__(self) -> None:
        self._taken_seconds = await self._queue.take(
            self._places, self._deadline_seconds, self._priority
        )

    async def __aexit__(self, *_error: object) -> None:
        self._queue.give_back(self._taken_seconds)


class Admission:
    """The queues of all deployments."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._queues: dict[str, Queue] = {}

    def queue(self, deployment: str) -> Queue:
        """Returns the queue of a deployment; there are as many as deployments ever routed to."""
        found = self._queues.get(deployment)
        if found is None:
            found = self._queues[deployment] = Queue(deployment, self._clock)
        return found


def places_of(choice: Choice) -> int:
    """Returns how many requests the backends of a deployment work on at once."""
    each = choice.target.schema.max_concurrent_requests or DEFAULT_CONCURRENT_REQUESTS
    return each * len(choice.target.backends)
