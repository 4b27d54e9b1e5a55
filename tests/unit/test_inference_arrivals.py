"""How many messages of a tenant arrive at the same time."""

from __future__ import annotations

import asyncio

import pytest

from libs.clock import SystemClock
from libs.errors import ResourceExhausted
from libs.shared_limit import SharedLimit
from services.inference.api.arrivals import (
    CALLS_AT_ONCE,
    COPIES,
    MAX_CALLS,
    MEMORY_WAIT_SECONDS,
    Arrivals,
)
from services.inference.slots import REQUEST_OVERHEAD_BYTES


class Call:
    """The messages of a call, which a test sends; `None` ends it."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.asked = False

    async def read(self) -> bytes | None:
        self.asked = True
        return await self.sent.get()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def receive(arrivals: Arrivals, call: Call, tenant: str = "acme") -> asyncio.Task[bytes | None]:
    return asyncio.create_task(arrivals.only(tenant, call.read))


async def test_few_messages_of_a_tenant_arrive_at_once():
    """The next call is read when one has arrived; another tenant is not held back."""
    memory = SharedLimit(2**20, alpha=1.0)
    arrivals = Arrivals(memory, SystemClock())
    calls = [Call() for _ in range(CALLS_AT_ONCE + 1)]
    tasks = [receive(arrivals, call) for call in calls]
    other = Call()
    other_task = receive(arrivals, other, "other")
    await settle()
    assert [call.asked for call in calls] == [True] * CALLS_AT_ONCE + [False]
    assert other.asked
    calls[0].sent.put_nowait(b"one")
    await settle()
    assert await tasks[0] == b"one"
    assert calls[-1].asked
    calls[1].sent.put_nowait(None)
    assert await tasks[1] is None
    for task in (tasks[-1], other_task):
        task.cancel()
        await asyncio.wait([task])
    assert not arrivals._turns


async def test_a_tenant_that_holds_too_much_is_not_read():
    """Until its requests end; what has arrived waits for memory, and is not refused."""
    memory = SharedLimit(2 * REQUEST_OVERHEAD_BYTES + COPIES * 100, alpha=1.0)
    arrivals = Arrivals(memory, SystemClock())
    calls = [Call() for _ in range(3)]
    for call in calls:
        call.sent.put_nowait(bytes(60))
    tasks = [receive(arrivals, call) for call in calls]
    await asyncio.sleep(0.1)
    assert [task.done() for task in tasks] == [True, False, False]
    assert not calls[2].asked
    for task in tasks:
        message = await asyncio.wait_for(task, 1)
        assert message is not None
        arrivals.release("acme", message)
    assert memory.used == 0


async def test_streams_that_are_silent_hold_nobody_back():
    """They may wait for their next message as long as they like."""
    arrivals = Arrivals(SharedLimit(2**20, alpha=1.0), SystemClock())
    silent = [asyncio.create_task(arrivals.next("acme", Call().read)) for _ in range(9)]
    call = Call()
    call.sent.put_nowait(b"x")
    assert await asyncio.wait_for(receive(arrivals, call), 1) == b"x"
    for task in silent:
        task.cancel()
    await asyncio.wait(silent)


async def test_calls_that_wait_to_be_read_are_limited():
    """Beyond that they are refused at once: they would take the places of all at the edge."""
    memory = SharedLimit(2**20, alpha=1.0)
    memory.take("acme", 2**19)
    arrivals = Arrivals(memory, SystemClock())
    waiting = [receive(arrivals, Call()) for _ in range(MAX_CALLS // 2)]
    await settle()
    with pytest.raises(ResourceExhausted) as caught:
        await asyncio.wait_for(receive(arrivals, Call()), 1)
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.metadata == {"queue": "ModelInfer", "limit": str(MAX_CALLS // 2)}
    other = Call()
    other.sent.put_nowait(b"x")
    assert await asyncio.wait_for(receive(arrivals, other, "other"), 1) == b"x"
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    assert arrivals._calls.used == 0


class FastClock(SystemClock):
    """Sleeps as long as it is asked to, without waiting."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic_seconds(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("size_bytes", "waited_seconds"), [(60, MEMORY_WAIT_SECONDS), (2**20, 0.0)]
)
async def test_a_message_without_memory_is_refused(size_bytes, waited_seconds):
    """After a while; at once if it can never fit. It was in memory, uncounted, for ever."""
    memory = SharedLimit(2 * REQUEST_OVERHEAD_BYTES, alpha=2.0)
    memory.take("acme", REQUEST_OVERHEAD_BYTES)
    clock = FastClock()
    arrivals = Arrivals(memory, clock)
    call = Call()
    call.sent.put_nowait(bytes(size_bytes))
    with pytest.raises(ResourceExhausted) as caught:
        await asyncio.wait_for(receive(arrivals, call), 5)
    assert (caught.value.reason, caught.value.metadata["queue"]) == (
        "QUEUE_FULL",
        "inference.memory",
    )
    assert clock.seconds == pytest.approx(waited_seconds, abs=0.1)
    assert memory.used == REQUEST_OVERHEAD_BYTES
    assert arrivals._calls.used == 0
