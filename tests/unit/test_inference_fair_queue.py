"""The order in which the waiting requests of several tenants are admitted."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.fair_queue import MAX_REMEMBERED_TENANTS, FairQueue, Waiter


@pytest.fixture(autouse=True)
async def loop() -> None:
    """Requests make futures of the running loop."""


def push(
    queue: FairQueue,
    tenant: str,
    *,
    work: int = 1,
    deadline: float | None = None,
    priority: int = 0,
) -> Waiter:
    waiter = queue.waiter(tenant=tenant, work=work, deadline_seconds=deadline, priority=priority)
    queue.push(waiter)
    return waiter


def anybody(_: str) -> bool:
    return True


def admitted(queue: FairQueue, count: int) -> Iterator[Waiter]:
    """Yields the next requests, each removed."""
    for _ in range(count):
        waiter = queue.next(anybody)
        assert waiter is not None
        queue.admit(waiter)
        yield waiter


async def test_tenants_take_turns_whatever_they_send():
    """A hundred urgent requests of one tenant do not delay the only one of another."""
    queue = FairQueue()
    for _ in range(100):
        push(queue, "flood", deadline=1.0, priority=9)
    push(queue, "victim")
    assert "victim" in [waiter.tenant for waiter in admitted(queue, 2)]


async def test_the_shares_are_those_of_the_work_not_of_the_requests():
    """Who sends requests ten times as large gets a tenth of the turns."""
    queue = FairQueue()
    for _ in range(200):
        push(queue, "large", work=1000)
        push(queue, "small", work=100)
    turns = Counter(waiter.tenant for waiter in admitted(queue, 110))
    assert turns == {"small": 100, "large": 10}


async def test_weights_are_shares():
    """A tenant of weight 3 gets three times the work."""
    queue = FairQueue(lambda tenant: 3.0 if tenant == "gold" else 1.0)
    for _ in range(100):
        push(queue, "gold", work=7)
        push(queue, "other", work=7)
    turns = Counter(waiter.tenant for waiter in admitted(queue, 40))
    assert abs(turns["gold"] - 30) <= 1


async def test_a_tenant_that_was_idle_has_saved_no_turns():
    """It starts at the turn of the others, and gets its share from then on."""
    queue = FairQueue()
    for _ in range(100):
        push(queue, "busy", work=5)
    list(admitted(queue, 50))
    for _ in range(50):
        push(queue, "new", work=5)
    turns = Counter(waiter.tenant for waiter in admitted(queue, 20))
    assert abs(turns["new"] - 10) <= 1


async def test_a_tenant_with_one_request_at_a_time_gets_no_more_than_its_share():
    """What it used is remembered until the others have caught up."""
    queue = FairQueue()
    for _ in range(1000):
        push(queue, "many", work=10)
    work: Counter[str] = Counter()
    push(queue, "single", work=1000)
    for _ in range(500):
        (waiter,) = admitted(queue, 1)
        work[waiter.tenant] += waiter.work
        if waiter.tenant == "single":
            push(queue, "single", work=1000)
    assert work["single"] <= work["many"] + 1000


async def test_requests_of_a_tenant_are_ordered_by_deadline_priority_and_arrival():
    """In this order."""
    queue = FairQueue()
    late = push(queue, "a", deadline=9.0, priority=9)
    never = push(queue, "a")
    low = push(queue, "a", deadline=1.0)
    high = push(queue, "a", deadline=1.0, priority=1)
    again = push(queue, "a", deadline=1.0, priority=1)
    assert list(admitted(queue, 5)) == [high, again, low, late, never]


async def test_tenants_that_may_not_run_are_skipped():
    """And get their turn as soon as they may."""
    queue = FairQueue()
    blocked, free = push(queue, "blocked"), push(queue, "free")
    assert queue.next(lambda tenant: tenant == "free") is free
    queue.admit(free)
    assert queue.next(lambda tenant: tenant == "free") is None
    assert queue.next(anybody) is blocked


async def test_the_place_of_a_request_counts_the_turns_of_others():
    """Each of them has at most as many turns before it as it has requests of its own, and one."""
    queue = FairQueue()
    for tenant in ("a", "b"):
        for _ in range(50):
            push(queue, tenant)
    first = queue.waiter(tenant="c", work=1, deadline_seconds=None, priority=0)
    assert queue.ahead_of(first) == 2
    queue.push(first)
    second = queue.waiter(tenant="c", work=1, deadline_seconds=None, priority=0)
    assert queue.ahead_of(second) == 5


async def test_the_memory_of_tenants_that_came_once_is_limited():
    """Thousands of names leave a bounded number of tags."""
    queue = FairQueue()
    for number in range(5 * MAX_REMEMBERED_TENANTS):
        push(queue, f"tenant-{number}", work=10)
    list(admitted(queue, 5 * MAX_REMEMBERED_TENANTS))
    assert not queue
    assert not queue._flows
    assert len(queue._left) <= MAX_REMEMBERED_TENANTS


@settings(deadline=None, max_examples=60)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from("abc"), st.integers(1, 50), st.sampled_from(["push", "pop", "drop"])
        ),
        max_size=80,
    )
)
def test_tenants_that_wait_all_the_time_get_the_same(steps):
    """Whatever comes, goes and is cancelled: the work of two differs by one request each."""

    async def run() -> None:
        queue = FairQueue()
        backlog = {tenant: [push(queue, tenant, work=20) for _ in range(90)] for tenant in "xy"}
        waiting: list[Waiter] = []
        work: Counter[str] = Counter()
        for tenant, size, step in steps:
            if step == "push":
                waiting.append(push(queue, tenant, work=size))
            elif step == "drop" and waiting:
                queue.discard(waiting.pop(size % len(waiting)))
            else:
                (waiter,) = admitted(queue, 1)
                work[waiter.tenant] += waiter.work
                if waiter in waiting:
                    waiting.remove(waiter)
            assert abs(work["x"] - work["y"]) <= 20
        for waiter in (*waiting, *backlog["x"], *backlog["y"]):
            queue.discard(waiter)
        assert not queue

    asyncio.run(run())


async def test_after_a_pause_nobody_catches_up():
    """What a tenant was given while nobody else wanted it is not held against it."""
    queue = FairQueue()
    push(queue, "a", work=10_000)
    assert len(list(admitted(queue, 1))) == 1
    queue.restart()
    for _ in range(50):
        push(queue, "b")
    push(queue, "a")
    assert [waiter.tenant for waiter in admitted(queue, 3)] == ["b", "a", "b"]
