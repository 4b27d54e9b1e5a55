"""How many messages of a tenant arrive at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from libs.clock import SystemClock
from libs.shared_limit import SharedLimit
from services.inference.api import arrivals as arrivals_module
from services.inference.api.arrivals import COPIES, MESSAGES_AT_ONCE, Arrivals


class Call:
    """The messages of a call, which a test sends; `None` ends it."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.asked = False

    async def messages(self) -> AsyncIterator[bytes]:
        while True:
            self.asked = True
            message = await self.sent.get()
            if message is None:
                return
            yield message


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def receive(
    arrivals: Arrivals, call: Call, tenant: str = "acme", *, is_first: bool = True
) -> asyncio.Task[bytes | None]:
    return asyncio.create_task(arrivals.receive(tenant, call.messages(), is_first=is_first))


async def test_few_messages_of_a_tenant_arrive_at_once():
    """The next call is read when one has arrived; another tenant is not held back."""
    memory = SharedLimit(1000, alpha=1.0)
    arrivals = Arrivals(memory, SystemClock())
    calls = [Call() for _ in range(MESSAGES_AT_ONCE + 1)]
    tasks = [receive(arrivals, call) for call in calls]
    other = Call()
    other_task = receive(arrivals, other, "other")
    await settle()
    assert [call.asked for call in calls] == [True] * MESSAGES_AT_ONCE + [False]
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
    memory = SharedLimit(100 * COPIES, alpha=1.0)
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


async def test_a_stream_that_is_silent_lets_others_go_first(monkeypatch: pytest.MonkeyPatch):
    """It may wait for its next message as long as it likes."""
    monkeypatch.setattr(arrivals_module, "PATIENCE_SECONDS", 0.05)
    memory = SharedLimit(1000, alpha=1.0)
    arrivals = Arrivals(memory, SystemClock())
    silent = [receive(arrivals, Call(), is_first=False) for _ in range(MESSAGES_AT_ONCE)]
    call = Call()
    call.sent.put_nowait(b"x")
    assert await asyncio.wait_for(receive(arrivals, call), 1) == b"x"
    assert not any(task.done() for task in silent)
    for task in silent:
        task.cancel()
    await asyncio.wait(silent)
    assert not arrivals._turns
