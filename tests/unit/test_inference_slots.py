"""The slots of a deployment, under any interleaving of requests."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from libs.clock import SystemClock
from libs.errors import ResourceExhausted
from services.inference.slots import Demand, SlotQueue


class Clock(SystemClock):
    """Stands still."""

    def monotonic_seconds(self):
        return 0.0


@dataclass(eq=False)
class Request:
    """A request in the queue, or past it."""

    task: asyncio.Task[None] | None = None
    release: asyncio.Event = field(default_factory=asyncio.Event)
    entered: bool = False
    left: bool = False


class Requests(RuleBasedStateMachine):
    """Any interleaving of arrivals, ends and cancellations, in one turn of the loop or several."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.queue = SlotQueue("deployments/d", Clock())
        self.slots = 1
        self.requests: list[Request] = []
        self.settled = True

    async def work(
        self, request: Request, tenant: str, deadline: float | None, priority: int
    ) -> None:
        asked = Demand(tenant, deadline_seconds=deadline, priority=priority)
        async with self.queue.slot(asked):
            request.entered = True
            try:
                await request.release.wait()
            finally:
                request.left = True

    @staticmethod
    async def all_results(tasks: list[asyncio.Task[None]]) -> list[BaseException | None]:
        async with asyncio.timeout(5):
            return await asyncio.gather(*tasks, return_exceptions=True)

    def waiting(self) -> list[Request]:
        return [
            request
            for request in self.requests
            if request.task is not None and not request.task.done() and not request.entered
        ]

    def running(self) -> int:
        return sum(request.entered and not request.left for request in self.requests)

    @rule(
        tenant=st.sampled_from(["a", "b", "c"]),
        deadline=st.sampled_from([None, 1.0, 2.0]),
        priority=st.integers(0, 2),
        runs=st.booleans(),
    )
    def arrive(self, tenant: str, deadline: float | None, priority: int, *, runs: bool) -> None:
        request = Request()
        request.task = self.loop.create_task(self.work(request, tenant, deadline, priority))
        self.requests.append(request)
        self.settled = False
        if runs:
            self.one_turn()

    @precondition(lambda self: self.requests)
    @rule(index=st.integers(0, 100))
    def end(self, index: int) -> None:
        self.requests[index % len(self.requests)].release.set()
        self.settled = False

    @precondition(lambda self: self.requests)
    @rule(index=st.integers(0, 100))
    def cancel(self, index: int) -> None:
        task = self.requests[index % len(self.requests)].task
        assert task is not None
        task.cancel()
        self.settled = False

    @precondition(lambda self: self.running() and self.waiting())
    @rule(ended=st.integers(0, 100), cancelled=st.integers(0, 100))
    def end_one_and_cancel_another(self, ended: int, cancelled: int) -> None:
        """In one turn: the slot becomes free before the cancelled request can leave."""
        running = [each for each in self.requests if each.entered and not each.left]
        others = self.waiting()
        running[ended % len(running)].release.set()
        self.cancel(self.requests.index(others[cancelled % len(others)]))
        self.settled = False

    @rule(slots=st.integers(1, 3))
    def resize(self, slots: int) -> None:
        self.slots = max(self.slots, slots)
        self.queue.resize(self.slots)
        self.settled = False

    @rule()
    def one_turn(self) -> None:
        self.loop.run_until_complete(asyncio.sleep(0))

    @rule()
    def settle(self) -> None:
        for _ in range(20):
            self.one_turn()
        self.settled = True

    @invariant()
    def no_more_run_than_there_are_slots(self) -> None:
        assert 0 <= self.running() <= self.slots

    @invariant()
    def nobody_waits_while_a_slot_is_free(self) -> None:
        if self.settled:
            assert not self.waiting() or self.running() == self.slots

    def teardown(self) -> None:
        """All requests end, as cancelled or as done, and all slots are free again."""
        for request in self.requests:
            request.release.set()
        tasks = [request.task for request in self.requests if request.task is not None]
        try:
            results = self.loop.run_until_complete(self.all_results(tasks))
        finally:
            self.loop.close()
        assert all(
            result is None or isinstance(result, asyncio.CancelledError | ResourceExhausted)
            for result in results
        )
        queue = self.queue
        assert (queue._slots.used, queue._places.used, queue._memory.used) == (0, 0, 0)
        assert not queue._queue


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
