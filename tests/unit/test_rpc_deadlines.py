"""Deadlines that share one timer of the event loop."""

from __future__ import annotations

import asyncio

import pytest

from libs.errors import DeadlineExceeded
from libs.rpc import deadlines as module
from libs.rpc.deadlines import Deadlines


@pytest.fixture(autouse=True)
def _no_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEADLINE_MARGIN_SECONDS", 0.0)


async def _sleep(deadlines: Deadlines, *, limit: float, seconds: float) -> str:
    try:
        with deadlines.after(limit):
            await asyncio.sleep(seconds)
    except DeadlineExceeded:
        return "exceeded"
    return "done"


async def test_each_block_ends_at_its_own_deadline():
    """Whatever the order in which they start and end."""
    deadlines = Deadlines()
    limits = [0.3, 0.05, 0.2, 0.1, 60.0]
    started = asyncio.get_running_loop().time()
    ends: dict[float, float] = {}

    async def run(limit: float) -> None:
        assert await _sleep(deadlines, limit=limit, seconds=0.4) == (
            "done" if limit == 60.0 else "exceeded"
        )
        ends[limit] = asyncio.get_running_loop().time() - started

    await asyncio.gather(*map(run, limits))
    for limit in limits[:-1]:
        assert limit <= ends[limit] < limit + 0.1 + 0.4


async def test_a_deadline_that_has_passed_starts_no_work():
    """The block is not entered."""
    with pytest.raises(DeadlineExceeded), Deadlines().after(0):
        pytest.fail("it was entered")


async def test_a_later_deadline_fires_after_an_earlier_block_ended():
    """The timer was set for the earlier one."""
    deadlines = Deadlines()
    assert await _sleep(deadlines, limit=0.05, seconds=0.0) == "done"
    assert await _sleep(deadlines, limit=0.1, seconds=5.0) == "exceeded"


async def test_a_block_may_be_extended():
    """It ends at the new deadline."""
    deadline = Deadlines().after(0.05)
    with deadline:
        deadline.extend(60.0)
        await asyncio.sleep(0.1)


async def test_a_cancellation_from_outside_stays_one():
    """It is not reported as a passed deadline."""
    task = asyncio.ensure_future(_sleep(Deadlines(), limit=60.0, seconds=5.0))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_just_before_the_deadline_is_not_swallowed():
    """The task is cancelled twice; the caller's cancellation is not lost."""
    deadline = Deadlines().after(60.0)
    entered = asyncio.Event()

    async def work() -> None:
        with deadline:
            entered.set()
            await asyncio.sleep(5)

    task = asyncio.ensure_future(work())
    await entered.wait()
    task.cancel()
    deadline.expire()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_own_exception_is_kept():
    """A block that fails as its deadline passes reports its own failure."""
    deadline = Deadlines().after(60.0)

    async def work() -> None:
        with deadline:
            try:
                await asyncio.sleep(5)
            except asyncio.CancelledError:
                raise ValueError("cleaning up failed") from None

    task = asyncio.ensure_future(work())
    await asyncio.sleep(0)
    deadline.expire()
    with pytest.raises(ValueError, match="cleaning up"):
        await task
    assert task.cancelling() == 0
