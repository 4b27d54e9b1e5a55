"""The time limit for each token of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from services.inference.backends.stall import StallGuard, StallLimits
from services.inference.domain import BackendFailedError

LIMITS = StallLimits(first_token_seconds=0.6, between_tokens_seconds=0.2)


async def seconds_until_stall(steps: Callable[[StallGuard], Awaitable[None]]) -> float:
    async def guarded() -> None:
        with StallGuard(LIMITS) as guard:
            await steps(guard)
            await asyncio.sleep(5)

    loop = asyncio.get_running_loop()
    started = loop.time()
    with pytest.raises(BackendFailedError):
        await guarded()
    return loop.time() - started


@pytest.mark.parametrize(
    ("tokens_at", "expected"),
    [((), 0.6), ((0.01,), 0.21), ((0.5,), 0.7), ((0.1, 0.2, 0.3, 0.4), 0.6)],
)
async def test_silence_ends_the_block_at_its_own_limit(tokens_at, expected):
    """Counted from the last token; it is noticed a little later."""

    async def tokens(guard: StallGuard) -> None:
        now = 0.0
        for at in tokens_at:
            await asyncio.sleep(at - now)
            guard.progress()
            now = at

    assert expected - 0.01 <= await seconds_until_stall(tokens) < expected + 0.3


async def test_tokens_in_time_are_not_a_stall():
    """The stream is longer than the limits, and the task is not left cancelled."""
    patient = StallLimits(first_token_seconds=1.5, between_tokens_seconds=1.0)
    with StallGuard(patient) as guard:
        for _ in range(20):
            await asyncio.sleep(0.1)
            guard.progress()
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()
    await asyncio.sleep(1.1)


async def test_a_thousand_tokens_of_many_guards_set_one_timer(monkeypatch):
    """A token costs a look at the clock, and a request hardly more."""
    loop, timers = asyncio.get_running_loop(), []
    call_later = loop.call_later

    def counted(*args: Any) -> asyncio.TimerHandle:
        timers.append(args)
        return call_later(*args)

    monkeypatch.setattr(loop, "call_later", counted)
    for _ in range(10):
        with StallGuard(LIMITS) as guard:
            for _ in range(100):
                guard.progress()
    assert len(timers) == 1


async def test_the_limit_is_paused_while_the_reader_is_slow():
    """Afterwards it starts again."""

    async def wait_for_reader(guard: StallGuard) -> None:
        guard.progress()
        guard.pause()
        await asyncio.sleep(0.9)
        guard.progress()

    assert 1.09 < await seconds_until_stall(wait_for_reader) < 1.4


async def test_a_cancellation_from_outside_stays_a_cancellation():
    """Also if it comes together with the stall."""

    async def work() -> None:
        with StallGuard(LIMITS):
            await asyncio.sleep(5)

    for wait in (0.05, LIMITS.first_token_seconds):
        task = asyncio.create_task(work())
        await asyncio.sleep(wait)
        task.cancel()
        with pytest.raises((asyncio.CancelledError, BackendFailedError)):
            await task
        assert task.cancelled() or wait == LIMITS.first_token_seconds


async def test_an_error_in_the_block_is_raised_unchanged():
    """Only silence is a stall."""
    with pytest.raises(ValueError, match="garbage"), StallGuard(LIMITS):
        raise ValueError("garbage")
