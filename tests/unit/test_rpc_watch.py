"""Snapshots are kept while their stream is down, and read again when it is back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime

import grpc
from grpc.aio import Metadata

from libs.rpc.watch import FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS, SnapshotWatch


class Steps:
    """A clock whose sleeps take no time; it notes how long they were to be."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC)

    def monotonic_seconds(self) -> float:
        return sum(self.slept)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)


BREAK = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, Metadata(), Metadata(), "away", "away")


class Streams:
    """Streams that give snapshots and then break, end, or stay open."""

    def __init__(self, *streams: Sequence[object]) -> None:
        self._streams = list(streams)

    def open(self) -> AsyncIterator[int]:
        return self._told(self._streams.pop(0) if self._streams else [Ellipsis])

    async def _told(self, stream: Sequence[object]) -> AsyncIterator[int]:
        for item in stream:
            if isinstance(item, Exception):
                raise item
            if isinstance(item, int):
                yield item
            else:
                await asyncio.Event().wait()


async def run_until(streams: Streams, count: int) -> tuple[list[int], Steps]:
    """Watches until so many snapshots came and returns them with the clock."""
    told: list[int] = []
    enough = asyncio.Event()

    def take(snapshot: int) -> None:
        told.append(snapshot)
        if len(told) >= count:
            enough.set()

    clock = Steps()
    watch = SnapshotWatch("test", open_stream=streams.open, on_snapshot=take, clock=clock)
    running = asyncio.create_task(watch.run())
    async with asyncio.timeout(5):
        await enough.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return told, clock


async def test_a_stream_that_breaks_or_ends_is_opened_again():
    """Whatever ends it, the next snapshot comes from the next stream."""
    told, clock = await run_until(Streams([1, BREAK], [2], [3, Ellipsis]), 3)
    assert told == [1, 2, 3]
    assert clock.slept == [FIRST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS]


async def test_the_wait_grows_to_a_limit_and_starts_over_with_a_snapshot():
    """A dependency that is away for long is neither forgotten nor hammered."""
    _, clock = await run_until(Streams([1], *([[BREAK]] * 8), [2, BREAK], [3]), 3)
    assert clock.slept[0] == FIRST_BACKOFF_SECONDS
    assert clock.slept[1:5] == [0.2, 0.4, 0.8, 1.0]
    assert max(clock.slept) == MAX_BACKOFF_SECONDS
    assert clock.slept[-1] == FIRST_BACKOFF_SECONDS


async def test_the_first_snapshot_can_be_waited_for():
    """However often the stream breaks before it."""
    streams = Streams([BREAK], [7, Ellipsis])
    taken: list[int] = []
    watch = SnapshotWatch(
        "router", open_stream=streams.open, on_snapshot=taken.append, clock=Steps()
    )
    running = asyncio.create_task(watch.run())
    async with asyncio.timeout(5):
        await watch.wait_first()
    assert taken == [7]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
