"""The newest value, pushed to many readers."""

from __future__ import annotations

import asyncio

import pytest

from libs.rpc.latest import Latest


async def test_a_reader_gets_the_newest_value_at_once_and_each_that_follows():
    """A late reader gets the current value, and each change from then on."""
    latest = Latest[int]()
    latest.publish(1)
    latest.publish(2)
    assert latest.value == 2
    values = aiter(latest.follow())
    assert await anext(values) == 2
    waiting = asyncio.ensure_future(anext(values))
    await asyncio.sleep(0)
    assert not waiting.done()
    latest.publish(3)
    assert await waiting == 3


async def test_a_slow_reader_misses_what_was_replaced_meanwhile():
    """A reader that stands still holds one value back, not a queue of them."""
    latest = Latest[int]()
    latest.publish(0)
    values = aiter(latest.follow())
    assert await anext(values) == 0
    for value in range(1, 1001):
        latest.publish(value)
    assert await anext(values) == 1000


async def test_a_reader_waits_for_the_first_value():
    """There is no value before the first one."""
    latest = Latest[int]()
    first = asyncio.ensure_future(anext(aiter(latest.follow())))
    await asyncio.sleep(0)
    assert not first.done()
    latest.publish(7)
    assert await first == 7


async def test_equal_values_are_published_each_time():
    """What counts as a change is the publisher's to decide."""
    latest = Latest[int]()
    latest.publish(1)
    values = aiter(latest.follow())
    await anext(values)
    latest.publish(1)
    assert await anext(values) == 1


@pytest.mark.parametrize("waits", [True, False])
async def test_close_ends_readers_that_wait_and_those_to_come(waits):
    """A process that drains is not held up by its watches."""
    latest = Latest[int]()
    values = aiter(latest.follow())
    if waits:
        ending = asyncio.ensure_future(anext(values))
        await asyncio.sleep(0)
        latest.close()
    else:
        latest.close()
        ending = asyncio.ensure_future(anext(values))
    with pytest.raises(StopAsyncIteration):
        await ending
