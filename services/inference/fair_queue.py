"""Requests that wait, in an order that is fair to their tenants: start-time fair queueing.

Goyal, Vin and Cheng, "Start-time Fair Queueing: A Scheduling Algorithm for Integrated Services
Packet Switching Networks", SIGCOMM 1996; for servers that process several requests concurrently
SFQ(D), Jin, Chase and Kaur, "Interposed Proportional Sharing for a Storage Service Utility",
SIGMETRICS 2004. Each tenant has a tag, which grows by the work of each of its requests divided by
its weight; the tenant with the lowest tag is next. A tenant that did not wait for a while starts
at the tag of the request that was admitted last: it neither saves up turns nor has to catch up.
When nothing waits or runs any more, all tenants start again from the highest tag. Between two
tenants that wait all the time, the work that was admitted differs by at most one request each.

A tenant's own requests are ordered by deadline, then by priority, then by arrival.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

# Tags of tenants that do not wait now; of more than so many the lowest are removed.
MAX_REMEMBERED_TENANTS = 1024


@dataclass(order=True)
class Waiter:
    """A request that waits.

    Attributes:
        deadline_seconds: its caller's deadline, on the clock's monotonic time.
        number: its place in the order of arrival.
        work: an estimate, in the unit of all other requests in the queue.
        admitted: done when it may run.
    """

    deadline_seconds: float
    negative_priority: int
    number: int
    tenant: str = field(compare=False)
    work: int = field(compare=False)
    admitted: asyncio.Future[None] = field(compare=False)


class _Flow:
    """The waiting requests of one tenant, and its tag."""

    __slots__ = ("tag", "waiters")

    def __init__(self, tag: float) -> None:
        self.tag = tag
        self.waiters: list[Waiter] = []


class FairQueue:
    """The waiting requests of one deployment. Finding the next one takes a step for each tenant."""

    def __init__(self, weight_of: Callable[[str], float] = lambda _: 1.0) -> None:
        """Makes an empty queue; `weight_of` returns the share of a tenant relative to others."""
        self._weight_of = weight_of
        self._flows: dict[str, _Flow] = {}
        self._left: dict[str, float] = {}
        self._tag = 0.0
        self._count = 0
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return self._count

    def waiter(
        self, *, tenant: str, work: int, deadline_seconds: float | None, priority: int
    ) -> Waiter:
        """Returns a request that is not in the queue yet."""
        return Waiter(
            math.inf if deadline_seconds is None else deadline_seconds,
            -priority,
            next(self._numbers),
            tenant,
            work,
            asyncio.get_running_loop().create_future(),
        )

    def ahead_of(self, waiter: Waiter) -> int:
        """Returns how many requests are admitted before this one, as far as is known now."""
        flow = self._flows.get(waiter.tenant)
        own = sum(other < waiter for other in flow.waiters) if flow is not None else 0
        others = (len(each.waiters) for each in self._flows.values() if each is not flow)
        return own + sum(min(count, own + 1) for count in others)

    def push(self, waiter: Waiter) -> None:
        """Adds a request."""
        flow = self._flows.get(waiter.tenant)
        if flow is None:
            tag = max(self._tag, self._left.pop(waiter.tenant, 0.0))
            flow = self._flows[waiter.tenant] = _Flow(tag)
        heapq.heappush(flow.waiters, waiter)
        self._count += 1

    def next(self, may_run: Callable[[str], bool]) -> Waiter | None:
        """Returns the next request among the tenants that may run one, without removing it."""
        found: _Flow | None = None
        for tenant, flow in self._flows.items():
            if (found is None or flow.tag < found.tag) and may_run(tenant):
                found = flow
        return found.waiters[0] if found is not None else None

    def admit(self, waiter: Waiter) -> None:
        """Removes the first request of its tenant, which runs now: its work counts."""
        flow = self._flows[waiter.tenant]
        assert flow.waiters[0] is waiter  # noqa: S101  # `next` returned it
        heapq.heappop(flow.waiters)
        self._tag = max(self._tag, flow.tag)
        flow.tag += waiter.work / self._weight_of(waiter.tenant)
        self._removed(waiter.tenant, flow)

    def restart(self) -> None:
        """Makes all tenants equal again: nothing waits, and what was admitted has ended."""
        if self._left:
            self._tag = max(self._tag, *self._left.values())
            self._left.clear()

    def discard(self, waiter: Waiter) -> None:
        """Removes a request that no longer waits, if it is in the queue."""
        flow = self._flows.get(waiter.tenant)
        if flow is None or waiter not in flow.waiters:
            return
        flow.waiters.remove(waiter)
        heapq.heapify(flow.waiters)
        self._removed(waiter.tenant, flow)

    def _removed(self, tenant: str, flow: _Flow) -> None:
        self._count -= 1
        if flow.waiters:
            return
        del self._flows[tenant]
        if flow.tag <= self._tag:
            return
        self._left[tenant] = flow.tag
        if len(self._left) > MAX_REMEMBERED_TENANTS:
            tags = sorted(self._left.items(), key=lambda item: item[1])
            self._left = {
                name: tag for name, tag in tags[MAX_REMEMBERED_TENANTS // 2 :] if tag > self._tag
            }
