"""Hedged requests: a late first token comes from a second backend. All are real servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from libs.errors import (
    FailedPrecondition,
    Unavailable,
)
from services.inference import metrics
from services.inference.generation.hedging import (
    MAX_SAVED_HEDGES,
    HedgeBudget,
    HedgeLimits,
)
from tests.support.failover import mesh_of, state_of
from tests.support.provider import TEXT, mock_provider
from tests.support.triton import TEXT as TRITON_TEXT
from tests.support.triton import mock_triton

HEDGE = HedgeLimits(after_seconds=0.05, max_share=1.0)


@pytest.fixture
async def servers() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def test_a_late_first_token_comes_from_the_second_backend(tmp_path, servers):
    """The reader sees one answer, the late backend is cancelled."""
    late = await servers.enter_async_context(mock_provider("stall_first"))
    good = await servers.enter_async_context(mock_provider("slow"))
    before = metrics.HEDGED_REQUESTS.labels("m", "second")._value.get()
    async with mesh_of(late, good, tmp_path=tmp_path, hedge=HEDGE) as mesh:
        answer = await mesh.ask()
        await asyncio.wait_for(late.left.wait(), 0.5)
        assert state_of(mesh, 0) == 0  # being slow does not count as a failure
    assert answer.text == TEXT
    assert answer.call is not None
    assert answer.call.delivered.token_count == 9
    assert metrics.HEDGED_REQUESTS.labels("m", "second")._value.get() == before + 1


async def test_the_first_backend_wins_if_it_is_first_after_all(tmp_path, servers):
    """The first chunk decides, not the order of the calls."""
    late = await servers.enter_async_context(mock_triton())
    later = await servers.enter_async_context(mock_triton(stalls_after=0))
    async with mesh_of(late, later, tmp_path=tmp_path, hedge=HEDGE) as mesh:
        assert (await mesh.ask()).text == TRITON_TEXT
    assert not later.requests


async def test_hedging_is_limited_to_its_share(tmp_path, servers):
    """A slow pool does not get twice the work."""
    late = await servers.enter_async_context(mock_provider("slow"))
    late.pause_seconds = 0.06
    other = await servers.enter_async_context(mock_provider("slow"))
    other.pause_seconds = 0.06
    hedge = HedgeLimits(after_seconds=0.02, max_share=0.25)
    async with mesh_of(late, other, tmp_path=tmp_path, hedge=hedge) as mesh:
        await asyncio.gather(*(mesh.ask() for _ in range(8)))
    assert len(late.requests) + len(other.requests) == 8 + 2


async def test_if_both_fail_both_are_reported(tmp_path, servers):
    """A failed hedge does not end the first attempt; the call fails when both have failed."""
    late = await servers.enter_async_context(mock_provider("stall_mute"))
    bad = await servers.enter_async_context(mock_provider("401"))
    async with mesh_of(late, bad, tmp_path=tmp_path, hedge=HEDGE) as mesh:
        with pytest.raises((Unavailable, FailedPrecondition)) as caught:
            await mesh.ask()
    assert caught.value.metadata == {"backend": "b0,b1", "request_id": "r"}


async def test_a_cancelled_hedged_request_leaves_nothing_running(tmp_path, servers):
    """Both backends are cancelled, and no task is left."""
    late = await servers.enter_async_context(mock_provider("stall_mute"))
    later = await servers.enter_async_context(mock_provider("stall_mute"))
    async with mesh_of(late, later, tmp_path=tmp_path, hedge=HEDGE) as mesh:
        before = asyncio.all_tasks()
        running = asyncio.create_task(mesh.ask())
        await asyncio.wait_for(asyncio.gather(late.asked.wait(), later.asked.wait()), 1)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await asyncio.wait_for(asyncio.gather(late.left.wait(), later.left.wait()), 0.5)
        assert not [task for task in asyncio.all_tasks() - before if "ask" in repr(task)]


def test_saved_hedges_are_limited():
    """Many requests without hedges do not allow a burst of hedges later."""
    budget = HedgeBudget(HedgeLimits(after_seconds=1, max_share=0.5))
    assert not budget.take()
    for _ in range(1000):
        budget.count_request()
    assert sum(budget.take() for _ in range(1000)) == MAX_SAVED_HEDGES
