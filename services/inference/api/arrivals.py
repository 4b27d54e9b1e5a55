"""Receives large messages, few of a tenant at a time.

gRPC says how large a message is only when all of it is in memory. So a tenant whose requests hold
all the memory that it may have is not read any further: its client is held back by HTTP/2's
windows. Of its other calls, a few send at the same time, and the next ones when those have arrived
and have memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from libs.clock import Clock
from libs.shared_limit import SharedLimit

MESSAGES_AT_ONCE = 2
# A stream may be silent for long before its next message: it then lets others go first.
PATIENCE_SECONDS = 1.0
POLL_SECONDS = 0.02
# A message is in memory as it was received, renamed, and as it is sent to a backend.
COPIES = 3


class _Turns:
    """Who receives a message of one tenant now, and who waits to."""

    def __init__(self) -> None:
        self.free = asyncio.Semaphore(MESSAGES_AT_ONCE)
        self.users = 0


class _Turn:
    """Ends once, when the message has arrived or was not sent in time."""

    def __init__(self, turns: _Turns) -> None:
        self._turns = turns
        self._ended = False

    def end(self) -> None:
        """Lets the next message arrive."""
        if not self._ended:
            self._ended = True
            self._turns.free.release()


class Arrivals:
    """Receives the messages of all tenants."""

    def __init__(self, memory: SharedLimit, clock: Clock) -> None:
        """Makes it; `memory` counts what the requests of tenants hold, in bytes."""
        self._memory = memory
        self._clock = clock
        self._turns: dict[str, _Turns] = {}

    async def receive(
        self, tenant: str, messages: AsyncIterator[bytes], *, is_first: bool
    ) -> bytes | None:
        """Returns the next message of a call, which is to be released; None: there are no more.

        Args:
            tenant: who sends it.
            messages: of the call.
            is_first: the client has no reason to wait before it sends it.
        """
        turns = self._turns.get(tenant)
        if turns is None:
            turns = self._turns[tenant] = _Turns()
        turns.users += 1
        try:
            await turns.free.acquire()
            turn = _Turn(turns)
            timer = None
            try:
                while not self._memory.has_room(tenant):
                    await self._clock.sleep(POLL_SECONDS)
                if not is_first:
                    timer = asyncio.get_running_loop().call_later(PATIENCE_SECONDS, turn.end)
                message = await anext(messages, None)
                while message and not self._memory.take(tenant, COPIES * len(message)):
                    await self._clock.sleep(POLL_SECONDS)
                return message
            finally:
                turn.end()
                if timer is not None:
                    timer.cancel()
        finally:
            turns.users -= 1
            if not turns.users:
                del self._turns[tenant]

    def release(self, tenant: str, message: bytes) -> None:
        """Takes back the memory of a message that was received."""
        if message:
            self._memory.release(tenant, COPIES * len(message))
