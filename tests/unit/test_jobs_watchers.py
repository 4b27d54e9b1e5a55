"""Watchers of a job see it advance and end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from libs.errors import ResourceExhausted, Unavailable
from services.jobs.domain import Finished, Job, Started, State, advance
from services.jobs.watchers import MAX_CHANGES_BEHIND, JobWatchers

START = datetime(2026, 11, 1, tzinfo=UTC)
QUEUED = Job(
    job_id="j", tenant="acme", user="ann", payload=b"p", create_time=START, update_time=START
)


def after(job: Job, outcome: Started | Finished) -> Job:
    changed = advance(job, outcome, now=START, retention=timedelta(days=7))
    assert changed is not None
    return changed


RUNNING = after(QUEUED, Started(1))
ENDED = after(RUNNING, Finished(1, result=b"r"))


def reading(read: Callable[[], Job]) -> Callable[[], Awaitable[Job]]:
    async def read_record() -> Job:
        return read()

    return read_record


async def states(stream: AsyncIterator[Job]) -> list[State]:
    return [job.state async for job in stream]


async def test_changes_arrive_at_once_and_in_order() -> None:
    """Even those that follow each other faster than the watcher reads."""
    watchers = JobWatchers(limit=1, poll_seconds=60)
    stream = watchers.watch("j", reading(lambda: QUEUED), tenant="acme")
    seen = [(await anext(stream)).state]
    watchers.notify(RUNNING)
    watchers.notify(ENDED)
    seen += await states(stream)
    assert seen == [State.QUEUED, State.RUNNING, State.SUCCEEDED]


async def test_a_change_between_subscribing_and_reading_is_seen_once() -> None:
    """The record may be newer than the change that the watcher gets."""
    watchers = JobWatchers(limit=1, poll_seconds=60)

    def read() -> Job:
        watchers.notify(RUNNING)
        return RUNNING

    stream = watchers.watch("j", reading(read), tenant="acme")
    assert (await anext(stream)).state is State.RUNNING
    watchers.notify(ENDED)
    assert await states(stream) == [State.SUCCEEDED]


async def test_changes_of_another_replica_are_found() -> None:
    """By reading the record again."""
    records = iter([QUEUED, QUEUED, RUNNING, ENDED])
    watchers = JobWatchers(limit=1, poll_seconds=0.001)
    seen = await states(watchers.watch("j", reading(lambda: next(records)), tenant="acme"))
    assert seen == [State.QUEUED, State.RUNNING, State.SUCCEEDED]


async def test_a_job_that_has_ended_ends_the_stream() -> None:
    """One message, then the end."""
    watchers = JobWatchers(limit=1, poll_seconds=60)
    assert await states(watchers.watch("j", reading(lambda: ENDED), tenant="acme")) == [
        State.SUCCEEDED
    ]


async def test_a_slow_watcher_misses_changes_but_not_the_last() -> None:
    """The number of changes that wait for a watcher is limited."""
    watchers = JobWatchers(limit=1, poll_seconds=60)
    stream = watchers.watch("j", reading(lambda: QUEUED), tenant="acme")
    await anext(stream)
    for attempt in range(1, 3 * MAX_CHANGES_BEHIND):
        watchers.notify(replace(RUNNING, attempt_count=attempt))
    watchers.notify(replace(ENDED, attempt_count=1000))
    seen = [job async for job in stream]
    assert len(seen) == MAX_CHANGES_BEHIND
    assert seen[-1].attempt_count == 1000


async def test_watchers_get_an_error_when_the_process_stops() -> None:
    """A stream without an error means that the job has ended."""
    watchers = JobWatchers(limit=1, poll_seconds=60)
    stream = watchers.watch("j", reading(lambda: QUEUED), tenant="acme")
    await anext(stream)
    watchers.notify(RUNNING)
    assert (await anext(stream)).state is State.RUNNING
    watchers.close()
    with pytest.raises(Unavailable):
        await anext(stream)


async def test_one_watcher_too_many_is_refused_until_another_leaves() -> None:
    """The limit counts open streams."""
    watchers = JobWatchers(limit=1, poll_seconds=60)
    first = watchers.watch("j", reading(lambda: QUEUED), tenant="acme")
    await anext(first)
    with pytest.raises(ResourceExhausted) as caught:
        await anext(watchers.watch("k", reading(lambda: QUEUED), tenant="acme"))
    assert caught.value.metadata == {"queue": "watchers", "limit": "1"}
    assert caught.value.retry_after_seconds is not None
    await first.aclose()
    async with asyncio.timeout(1):
        assert (
            await anext(watchers.watch("k", reading(lambda: QUEUED), tenant="acme"))
        ).state is State.QUEUED


async def test_one_tenant_cannot_open_all_streams() -> None:
    """Another one can always watch its job."""
    watchers = JobWatchers(limit=10, poll_seconds=60)
    streams = [watchers.watch("j", reading(lambda: QUEUED), tenant="flood") for _ in range(6)]
    for stream in streams[:5]:
        await anext(stream)
    with pytest.raises(ResourceExhausted) as caught:
        await anext(streams[5])
    assert caught.value.metadata == {"queue": "watchers", "limit": "5"}
    other = watchers.watch("k", reading(lambda: QUEUED), tenant="acme")
    assert (await anext(other)).state is State.QUEUED
    await other.aclose()
    for stream in streams:
        await stream.aclose()
    assert watchers._streams.used == 0
