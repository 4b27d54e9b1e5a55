"""Snapshots stay in force while their stream is down or sends bad ones, until the next good one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime

import grpc
import pytest
from google.protobuf.message import DecodeError
from grpc.aio import Metadata
from prometheus_client import REGISTRY

from libs.rpc.watch import FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS, SnapshotWatch


class Steps:
    """A clock whose sleeps return at once; it records their lengths."""

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
    """Streams that send snapshots and then break, end, or stay open; negative ones are poison."""

    def __init__(self, *streams: Sequence[object]) -> None:
        self._streams = list(streams)

    def open(self) -> AsyncIterator[int]:
        return self._items(self._streams.pop(0) if self._streams else [Ellipsis])

    async def _items(self, stream: Sequence[object]) -> AsyncIterator[int]:
        for item in stream:
            if isinstance(item, Exception):
                raise item
            if isinstance(item, int):
                yield item
            else:
                await asyncio.Event().wait()


async def run_until(streams: Streams, count: int) -> tuple[list[int], Steps]:
    """Watches until so many snapshots were accepted; returns them and the clock."""
    taken: list[int] = []
    enough = asyncio.Event()

    def take(snapshot: int) -> None:
        if snapshot < 0:
            raise ValueError("a poison snapshot")
        taken.append(snapshot)
        if len(taken) >= count:
            enough.set()

    clock = Steps()
    watch = SnapshotWatch("test", open_stream=streams.open, on_snapshot=take, clock=clock)
    running = asyncio.create_task(watch.run())
    async with asyncio.timeout(5):
        await enough.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return taken, clock


async def test_a_stream_that_breaks_or_ends_is_opened_again():
    """After an error and after a regular end."""
    taken, clock = await run_until(Streams([1, BREAK], [2], [3, Ellipsis]), 3)
    assert taken == [1, 2, 3]
    assert clock.slept == [FIRST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS]


async def test_the_wait_grows_to_a_limit_and_starts_over_with_a_snapshot():
    """A dependency that is down for long is neither forgotten nor flooded."""
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


def rejected() -> float:
    labels = {"dependency": "test"}
    return REGISTRY.get_sample_value("headrace_watch_rejected_snapshots_total", labels) or 0.0


async def test_a_poison_snapshot_is_counted_and_the_next_one_is_taken_from_the_same_stream():
    """It ends neither the watch nor the stream."""
    before = rejected()
    taken, clock = await run_until(Streams([1, -1, -2, 2, Ellipsis]), 2)
    assert taken == [1, 2]
    assert clock.slept == []
    assert rejected() == before + 2


@pytest.mark.parametrize("error", [DecodeError("not a message"), RuntimeError("broken")], ids=repr)
async def test_bytes_that_are_not_a_snapshot_are_rejected_and_the_stream_is_opened_again(error):
    """GRPC ends a stream whose message cannot be parsed with the parser's error."""
    before = rejected()
    taken, _ = await run_until(Streams([1, error], [2, Ellipsis]), 2)
    assert taken == [1, 2]
    assert rejected() == before + 1


async def test_a_dependency_that_sends_only_poison_is_asked_ever_less():
    """A message that is rejected does not reset the pause."""
    _, clock = await run_until(Streams(*([[-1]] * 6), [1, Ellipsis]), 1)
    assert clock.slept == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


async def test_a_first_snapshot_that_is_rejected_does_not_count_as_first():
    """The process is not ready before it has a good one."""
    good = asyncio.Event()

    async def stream() -> AsyncIterator[int]:
        yield -1
        await good.wait()
        yield 1
        await asyncio.Event().wait()

    def take(snapshot: int) -> None:
        if snapshot < 0:
            raise ValueError("a poison snapshot")

    watch = SnapshotWatch("test", open_stream=stream, on_snapshot=take, clock=Steps())
    running = asyncio.create_task(watch.run())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(watch.wait_first(), 0.05)
    good.set()
    await asyncio.wait_for(watch.wait_first(), 5)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
