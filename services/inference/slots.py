"""The slots of one deployment, and the bounded queue of requests that wait for them.

A request holds a slot while its backends work. Where none is free, it waits in a `FairQueue`. A
request whose estimated wait exceeds its deadline is refused immediately instead of timing out
later. The estimate is the average time that requests hold a slot (exponentially weighted), times
the requests ahead, divided by the number of requests that run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from prometheus_client import Gauge

from libs.clock import Clock
from libs.errors import ResourceExhausted
from libs.shared_limit import SharedLimit
from services.inference.deadlines import deadline_exceeded, seconds_left
from services.inference.fair_queue import FairQueue, Waiter
from services.inference.work_window import WorkWindow

# The queue's limit: this many waiting requests per slot.
MAX_WAITING_PER_SLOT = 24
# The edge has 4,096 requests at a time for all; those that wait leave room for those that run, for
# calls that are not read yet, and for other deployments.
MAX_WAITING = 2048
# A tenant alone gets four fifths of the slots, two thirds of the queue and half of the memory; of
# up to four slots it gets all.
SLOTS_ALPHA = 4.0
WAITING_ALPHA = 2.0
MEMORY_ALPHA = 1.0
# What a request needs besides its input: tasks, buffers, its call.
REQUEST_OVERHEAD_BYTES = 16 * 1024
# Half of it is enough for the copies of the largest tensor.
DEFAULT_MEMORY_LIMIT_BYTES = 400 * 1024 * 1024
# A large request is divided so that about so many of its parts keep the backends busy.
PARTS_IN_FLIGHT = 4
# The weight of the newest service time in the average.
SMOOTHING = 0.1


class Demand(NamedTuple):
    """What a request asks for.

    Attributes:
        tenant: who asks.
        work: an estimate: tokens, or for other tensors about as many units for as many bytes.
        size_bytes: memory of its input; None: it is counted already, see `api.arrivals`.
        priority: orders the requests of one tenant; the highest is first.
        deadline_seconds: the caller's deadline, on the clock's monotonic time; None: none.
        is_part: it is a part of a request that was admitted as a whole: it counts neither as a
            waiting request nor as memory.
    """

    tenant: str
    work: int = 1
    size_bytes: int | None = 0
    priority: int = 0
    deadline_seconds: float | None = None
    is_part: bool = False

    @property
    def held_bytes(self) -> int:
        """Memory that counts against the tenant's limit while the request waits or runs."""
        if self.is_part or self.size_bytes is None:
            return 0
        return self.size_bytes + REQUEST_OVERHEAD_BYTES


class SlotQueue:
    """The slots of one deployment and the requests that wait for them."""

    def __init__(
        self,
        deployment: str,
        clock: Clock,
        *,
        memory: SharedLimit | None = None,
        window: WorkWindow | None = None,
        weight_of: Callable[[str], float] = lambda _: 1.0,
        gauge: Gauge | None = None,
    ) -> None:
        """Makes a queue without requests, with one slot.

        Args:
            deployment: its name, for errors and the metric.
            clock: the time.
            memory: what the requests of all queues hold together, in bytes.
            window: limits the work in flight; None: only the slots do.
            weight_of: the share of a tenant relative to others.
            gauge: shows how many requests wait.
        """
        self._deployment = deployment
        self._clock = clock
        self._slots = SharedLimit(1, alpha=SLOTS_ALPHA)
        self._places = SharedLimit(MAX_WAITING_PER_SLOT, alpha=WAITING_ALPHA)
        self._memory = memory or SharedLimit(DEFAULT_MEMORY_LIMIT_BYTES, alpha=MEMORY_ALPHA)
        self._window = window
        self._queue = FairQueue(weight_of)
        self._held_seconds = 0.0
        self._gauge = gauge
        self._on_idle: Callable[[], None] | None = None

    def slot(self, demand: Demand) -> Slot:
        """Returns a context manager that holds a slot; entering it waits until one is free.

        Args:
            demand: what the request asks for.

        Raises:
            ResourceExhausted: on entry: the tenant, or all of them, wait for or hold too much
                (`QUEUE_FULL`), or the wait would be longer than the deadline allows.
            DeadlineExceeded: on entry: the wait was longer than estimated.
        """
        return Slot(self, demand)

    async def acquire(self, demand: Demand) -> float:
        """Waits for a slot and returns the time at which it was acquired, for `release`.

        Raises:
            ResourceExhausted, DeadlineExceeded: see `slot`.
        """
        size_bytes = demand.held_bytes
        if size_bytes:
            take_memory(self._memory, demand.tenant, size_bytes)
        try:
            if self._queue or not self._has_work_left(demand.work):
                await self._wait(demand)
            elif self._slots.take(demand.tenant):
                self._start(demand.work)
            else:
                await self._wait(demand)
        except BaseException:
            if size_bytes:
                self._memory.release(demand.tenant, size_bytes)
            raise
        return self._clock.monotonic_seconds()

    def release(self, demand: Demand, acquired_seconds: float, *, succeeded: bool) -> None:
        """Frees a slot that was acquired at that time, and admits the next request."""
        held = self._clock.monotonic_seconds() - acquired_seconds
        weight = SMOOTHING if self._held_seconds else 1.0
        self._held_seconds += weight * (held - self._held_seconds)
        if size_bytes := demand.held_bytes:
            self._memory.release(demand.tenant, size_bytes)
        if self._window is not None and succeeded and self._queue:
            self._window.learn(demand.work, held)
        self._end(demand.tenant, demand.work)
        if self._queue:
            self._admit()
        elif self._on_idle is not None:
            self._check_idle()

    def resize(self, slots: int) -> None:
        """Sets the number of slots, at least 1; where there are more now, admits who waits."""
        self._slots.limit = slots
        self._places.limit = min(MAX_WAITING, MAX_WAITING_PER_SLOT * slots)
        if self._queue:
            self._admit()

    def retire(self, on_idle: Callable[[], None]) -> None:
        """Calls `on_idle` as soon as no request runs or waits: now, or after the last one."""
        self._on_idle = on_idle
        self._check_idle()

    def keep(self) -> None:
        """Cancels `retire`."""
        self._on_idle = None

    def wait_seconds(self, ahead: int) -> float:
        """Returns the estimated wait of a request with `ahead` requests in front of it."""
        return (ahead + 1) * self._held_seconds / max(1, self._slots.used)

    @property
    def part_work(self) -> int:
        """How much work a part of a large request should have, so that others run in between."""
        return 1 if self._window is None else max(1, int(self._window.limit) // PARTS_IN_FLIGHT)

    async def _wait(self, demand: Demand) -> None:
        waiter = self._queue.waiter(
            tenant=demand.tenant,
            work=demand.work,
            deadline_seconds=demand.deadline_seconds,
            priority=demand.priority,
        )
        if self._starts_at_once(waiter):
            return
        counted = not demand.is_part
        self._check_wait(waiter, counted=counted)
        left = seconds_left(demand.deadline_seconds, self._clock, waiting_for="slot")
        if counted:
            self._places.take(demand.tenant)
        self._queue.push(waiter)
        self._show()
        try:
            async with asyncio.timeout(left):
                await waiter.admitted
        except TimeoutError as error:
            self._leave(waiter)
            raise deadline_exceeded("slot") from error
        except BaseException:
            self._leave(waiter)
            raise
        finally:
            if counted:
                self._places.release(demand.tenant)

    def _starts_at_once(self, waiter: Waiter) -> bool:
        """Starts a request if a slot is free that no waiting request may have."""
        if self._queue.next(self._slots.has_room) is not None:
            return False
        if not self._has_work_left(waiter.work) or not self._slots.take(waiter.tenant):
            return False
        self._start(waiter.work)
        return True

    def _check_wait(self, waiter: Waiter, *, counted: bool) -> None:
        """Refuses a request whose wait would exceed its deadline, or where too many wait."""
        wait = self.wait_seconds(self._queue.ahead_of(waiter))
        if counted and not self._places.has_room(waiter.tenant):
            share = self._places.share_of(waiter.tenant)
            raise self._refusal(f"this tenant may have {share} waiting requests now", share, wait)
        if self._clock.monotonic_seconds() + wait > waiter.deadline_seconds:
            share = self._places.share_of(waiter.tenant)
            raise self._refusal("the wait would exceed the deadline", share, wait)

    def _leave(self, waiter: Waiter) -> None:
        """Removes a request that was cancelled while it waited, or just after it was admitted."""
        if waiter.admitted.done() and not waiter.admitted.cancelled():
            self._end(waiter.tenant, waiter.work)
        else:  # it is not in the queue if a slot became free after the cancellation
            self._queue.discard(waiter)
        self._admit()
        self._check_idle()

    def _admit(self) -> None:
        while (waiter := self._queue.next(self._slots.has_room)) is not None:
            if waiter.admitted.done():  # it is cancelled and about to leave
                self._queue.discard(waiter)
                continue
            if not self._has_work_left(waiter.work):
                break  # others must not overtake it indefinitely
            self._queue.admit(waiter)
            self._slots.take(waiter.tenant)
            self._start(waiter.work)
            waiter.admitted.set_result(None)
        self._show()

    def _has_work_left(self, work: int) -> bool:
        return self._window is None or self._window.fits(work)

    def _start(self, work: int) -> None:
        if self._window is not None:
            self._window.started(work)

    def _end(self, tenant: str, work: int) -> None:
        self._slots.release(tenant)
        if self._window is not None:
            self._window.ended(work)
        if not self._slots.used and not self._queue:
            self._queue.restart()

    def _show(self) -> None:
        if self._gauge is not None:
            self._gauge.set(len(self._queue))

    def _check_idle(self) -> None:
        if self._on_idle is not None and not self._slots.used and not self._queue:
            on_idle, self._on_idle = self._on_idle, None
            on_idle()

    def _refusal(self, why: str, limit: int, wait_seconds: float) -> ResourceExhausted:
        return ResourceExhausted.of_queue(
            self._deployment,
            f"{self._deployment} is busy: {why}",
            limit=limit,
            retry_after_seconds=max(wait_seconds, 0.1),
        )


class Slot:
    """Holds a slot while its block runs. A class, not a generator: every request enters one."""

    __slots__ = ("_acquired_seconds", "_demand", "_queue")

    def __init__(self, queue: SlotQueue, demand: Demand) -> None:
        self._queue = queue
        self._demand = demand
        self._acquired_seconds = 0.0

    async def __aenter__(self) -> None:
        self._acquired_seconds = await self._queue.acquire(self._demand)

    async def __aexit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        self._queue.release(self._demand, self._acquired_seconds, succeeded=kind is None)


def take_memory(memory: SharedLimit, tenant: str, size_bytes: int) -> None:
    """Counts the memory of a request.

    Raises:
        ResourceExhausted: the tenant, or all of them, hold too much (`QUEUE_FULL`).
    """
    if memory.take(tenant, size_bytes):
        return
    share = memory.share_of(tenant)
    raise ResourceExhausted.of_queue(
        "inference.memory",
        f"the requests of this tenant hold {memory.held_by(tenant)} bytes of memory, and it may "
        f"hold about {share} now; send fewer or smaller requests at a time",
        limit=share,
        retry_after_seconds=1.0,
    )
