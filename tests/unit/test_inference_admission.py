"""The queue in front of the backends."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from libs.clock import SystemClock
from libs.errors import ResourceExhausted
from services.inference.admission import MAX_WAITING_PER_PLACE, Queue


class Clock(SystemClock):
    """Stands still until it is told to go on."""

    seconds = 0.0

    def monotonic_seconds(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def queue(clock):
    return Queue("deployments/d", clock)


async def hold(queue, *, deadline=None, priority=0, places=1, log=None, name="", release=None):
    async with queue.place(places=places, deadline_seconds=deadline, priority=priority):
        if log is not None:
            log.append(name)
        if release is not None:
            await release.wait()


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_places_are_given_at_once_while_there_are_some(queue):
    """Two places, two requests, no wait."""
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(
                queue.place(places=2, deadline_seconds=None, priority=0)
            )


async def test_who_must_be_done_first_goes_first_then_who_matters_more(queue):
    """Deadline, then priority, then arrival."""
    log: list[str] = []
    first = asyncio.Event()
    tasks = [asyncio.create_task(hold(queue, release=first))]
    await settle()
    for name, deadline, priority in [
        ("late", 100, 9), ("low", 50, 0), ("high", 50, 5), ("none", None, 9),
    ]:  # fmt: skip
        tasks.append(
            asyncio.create_task(
                hold(queue, deadline=deadline, priority=priority, log=log, name=name)
            )
        )
    await settle()
    first.set()
    await asyncio.gather(*tasks)
    assert log == ["high", "low", "late", "none"]


async def test_a_wait_past_the_deadline_is_refused_at_once(queue, clock):
    """The estimate comes from how long places were held; the refusal says when to come back."""
    async with queue.place(places=1, deadline_seconds=None, priority=0):
        clock.seconds += 10
    release = asyncio.Event()
    running = asyncio.create_task(hold(queue, release=release))
    await settle()
    with pytest.raises(ResourceExhausted) as caught:
        await hold(queue, deadline=clock.seconds + 5)
    assert caught.value.retry_after_seconds == pytest.approx(10)
    patient = asyncio.create_task(hold(queue, deadline=clock.seconds + 20))
    await settle()
    release.set()
    await asyncio.gather(running, patient)


async def test_a_full_queue_refuses(queue):
    """The queue has a limit."""
    release = asyncio.Event()
    tasks = [
        asyncio.create_task(hold(queue, release=release)) for _ in range(MAX_WAITING_PER_PLACE + 1)
    ]
    await settle()
    with pytest.raises(ResourceExhausted):
        await hold(queue)
    release.set()
    await asyncio.gather(*tasks)


async def test_a_cancelled_request_leaves_no_place_behind(queue):
    """Neither one that waits nor one that was just admitted."""
    release = asyncio.Event()
    running = asyncio.create_task(hold(queue, release=release))
    await settle()
    waits, next_one = (asyncio.create_task(hold(queue)) for _ in range(2))
    await settle()
    waits.cancel()
    await settle()
    release.set()
    await running
    await asyncio.wait_for(next_one, 1)
    admitted = asyncio.Event()
    blocker = asyncio.create_task(hold(queue, release=admitted))
    await settle()
    lucky = asyncio.create_task(hold(queue))
    await settle()
    admitted.set()
    await asyncio.sleep(0)
    lucky.cancel()
    await asyncio.gather(blocker, lucky, return_exceptions=True)
    await asyncio.wait_for(hold(queue), 1)
