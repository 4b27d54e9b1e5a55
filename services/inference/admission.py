"""Admission control: one bounded queue per deployment, ordered by deadline, then by priority.

A deployment has a number of slots; a request holds one while its backends work. A request whose
estimated wait exceeds its deadline is refused at once instead of timing out later. The estimate is
the average time that requests hold a slot (exponentially weighted), times the requests ahead,
divided by the number of slots.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from headrace.router.v1.router_internal_pb2 import RouteTarget
from prometheus_client import Gauge

from libs.clock import Clock
from libs.errors import ResourceExhausted
from libs.routes import RouteTable
from services.inference.deadlines import deadline_exceeded, seconds_left

_WAITING = Gauge(
    "headrace_inference_waiting_requests", "Requests that wait for a slot.", ["deployment"]
)

# Used where the version's schema does not set `max_concurrent_requests`.
DEFAULT_CONCURRENT_REQUESTS = 256
# The queue's limit: this many waiting requests per slot.
MAX_WAITING_PER_SLOT = 16
# The weight of the newest service time in the average.
SMOOTHING = 0.1


@dataclass(order=True)
class _Waiter:
    deadline_seconds: float
    negative_priority: int
    number: int
    admitted: asyncio.Future[None] = field(compare=False)


class SlotQueue:
    """The slots of one deployment and the requests that wait for them."""

    def __init__(self, deployment: str, clock: Clock) -> None:
        self._deployment = deployment
        self._clock = clock
        self._slots = 1
        self._running = 0
        self._held_seconds = 0.0
        self._waiters: list[_Waiter] = []
        self._numbers = itertools.count()
        self._gauge = _WAITING.labels(deployment)
        self._on_idle: Callable[[], None] | None = None

    def slot(self, *, slots: int, deadline_seconds: float | None, priority: int) -> Slot:
        """Returns a context manager that holds a slot; entering it waits until one is free.

        Args:
            slots: how many slots the deployment has now.
            deadline_seconds: when the caller gives up, on the clock's monotonic time.
            priority: among equal deadlines, the highest is admitted first.

        Raises:
            ResourceExhausted: on entry: the queue is full (`QUEUE_FULL`), or the wait would be
                longer than the deadline allows.
            DeadlineExceeded: on entry: the wait was longer than estimated.
        """
        deadline = math.inf if deadline_seconds is None else deadline_seconds
        return Slot(self, slots, deadline, priority)

    async def acquire(self, slots: int, deadline_seconds: float, priority: int) -> float:
        """Waits for a slot and returns the time at which it was acquired, for `release`.

        Raises:
            ResourceExhausted, DeadlineExceeded: see `slot`.
        """
        self.resize(slots)
        if self._running >= slots:
            await self._wait(deadline_seconds, priority)
        else:
            self._running += 1
        return self._clock.monotonic_seconds()

    def release(self, acquired_seconds: float) -> None:
        """Frees a slot that was acquired at that time, and admits the next request."""
        held = self._clock.monotonic_seconds() - acquired_seconds
        weight = SMOOTHING if self._held_seconds else 1.0
        self._held_seconds += weight * (held - self._held_seconds)
        self._running -= 1
        if self._waiters:
            self._admit()
        elif self._on_idle is not None:
            self._check_idle()

    def resize(self, slots: int) -> None:
        """Sets the number of slots, at least 1; where there are more now, admits who waits."""
        self._slots = slots
        if self._waiters:
            self._admit()

    def retire(self, on_idle: Callable[[], None]) -> None:
        """Calls `on_idle` as soon as no request runs or waits: at once, or after the last one."""
        self._on_idle = on_idle
        self._check_idle()

    def keep(self) -> None:
        """Revokes `retire`."""
        self._on_idle = None

    def wait_seconds(self, ahead: int) -> float:
        """Returns the estimated wait of a request with `ahead` requests in front of it."""
        return (ahead + 1) * self._held_seconds / self._slots

    async def _wait(self, deadline_seconds: float, priority: int) -> None:
        waiter = _Waiter(
            deadline_seconds,
            -priority,
            next(self._numbers),
            asyncio.get_running_loop().create_future(),
        )
        ahead = sum(other < waiter for other in self._waiters)
        wait = self.wait_seconds(ahead)
        if len(self._waiters) >= MAX_WAITING_PER_SLOT * self._slots:
            raise self._refusal("its queue is full", wait)
        if self._clock.monotonic_seconds() + wait > deadline_seconds:
            raise self._refusal("the wait would exceed the deadline", wait)
        left = None if math.isinf(deadline_seconds) else deadline_seconds
        left = seconds_left(left, self._clock, waiting_for="slot")
        heapq.heappush(self._waiters, waiter)
        self._gauge.set(len(self._waiters))
        try:
            async with asyncio.timeout(left):
                await waiter.admitted
        except TimeoutError as error:
            self._leave(waiter)
            raise deadline_exceeded("slot") from error
        except BaseException:
            self._leave(waiter)
            raise

    def _leave(self, waiter: _Waiter) -> None:
        """Removes a request that was cancelled while it waited, or just after it was admitted."""
        if waiter.admitted.done() and not waiter.admitted.cancelled():
            self._running -= 1
        elif waiter in self._waiters:  # not if a slot became free after the cancellation
            self._waiters.remove(waiter)
            heapq.heapify(self._waiters)
        self._admit()
        self._check_idle()

    def _admit(self) -> None:
        while self._waiters and self._running < self._slots:
            waiter = heapq.heappop(self._waiters)
            if not waiter.admitted.done():  # else it is cancelled and about to leave
                self._running += 1
                waiter.admitted.set_result(None)
        self._gauge.set(len(self._waiters))

    def _check_idle(self) -> None:
        if self._on_idle is not None and not self._running and not self._waiters:
            on_idle, self._on_idle = self._on_idle, None
            on_idle()

    def _refusal(self, why: str, wait_seconds: float) -> ResourceExhausted:
        return ResourceExhausted(
            f"{self._deployment} is busy: {why}",
            reason="QUEUE_FULL",
            metadata={
                "queue": self._deployment,
                "limit": str(MAX_WAITING_PER_SLOT * self._slots),
            },
            retry_after_seconds=max(wait_seconds, 0.1),
        )


class Slot:
    """Holds a slot while its block runs. A class, not a generator: every request enters one."""

    __slots__ = ("_acquired_seconds", "_deadline_seconds", "_priority", "_queue", "_slots")

    def __init__(
        self, queue: SlotQueue, slots: int, deadline_seconds: float, priority: int
    ) -> None:
        self._queue = queue
        self._slots = slots
        self._deadline_seconds = deadline_seconds
        self._priority = priority
        self._acquired_seconds = 0.0

    async def __aenter__(self) -> None:
        self._acquired_seconds = await self._queue.acquire(
            self._slots, self._deadline_seconds, self._priority
        )

    async def __aexit__(self, *_error: object) -> None:
        self._queue.release(self._acquired_seconds)


class Admission:
    """The queues of all deployments."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._queues: dict[str, SlotQueue] = {}

    def queue(self, deployment: str) -> SlotQueue:
        """Returns the queue of a deployment, a new one where there is none."""
        found = self._queues.get(deployment)
        if found is None:
            found = self._queues[deployment] = SlotQueue(deployment, self._clock)
        return found

    def update(self, routes: RouteTable) -> None:
        """Resizes the queues to these routes and drops those of all other deployments.

        A queue that still has requests is dropped when the last of them ends.
        """
        slots = {target.deployment: slots_of(target) for target in routes.targets()}
        for deployment, queue in list(self._queues.items()):
            if deployment not in slots:
                queue.retire(partial(self._drop, deployment))
                continue
            queue.keep()
            if slots[deployment]:  # without a ready backend nothing is admitted anyway
                queue.resize(slots[deployment])

    def _drop(self, deployment: str) -> None:
        del self._queues[deployment]
        _WAITING.remove(deployment)


def slots_of(target: RouteTarget) -> int:
    """Returns how many requests the backends of a deployment process at once."""
    per_backend = target.schema.max_concurrent_requests or DEFAULT_CONCURRENT_REQUESTS
    return per_backend * len(target.backends)
