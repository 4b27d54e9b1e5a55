"""Usage that is recorded but not booked yet: the messages that are left in the stream."""

from __future__ import annotations

import asyncio

import nats.errors
import structlog
from nats.js import JetStreamContext
from nats.js.errors import Error as JetStreamError

from libs.bus.subjects import USAGE
from libs.clock import Clock

_log = structlog.get_logger()

MAX_WAIT_SECONDS = 2.0
FIRST_PAUSE_SECONDS = 0.005
MAX_PAUSE_SECONDS = 0.1


class UsageBacklog:
    """Lets readers of the ledger see all usage that was recorded before their call."""

    def __init__(self, js: JetStreamContext, clock: Clock) -> None:
        self._js = js
        self._clock = clock

    async def wait_booked(self) -> bool:
        """Waits until all usage recorded before the call is booked, for at most two seconds.

        Returns:
            Whether it is; False also where the bus does not answer.
        """
        try:
            async with asyncio.timeout(MAX_WAIT_SECONDS):
                await self._until_booked()
        except (TimeoutError, nats.errors.Error, JetStreamError) as error:
            _log.warning("recorded usage may not be booked yet", error=error)
            return False
        return True

    async def _until_booked(self) -> None:
        # A message leaves the stream when it is acknowledged: when its usage is booked.
        state = (await self._js.stream_info(USAGE.name)).state
        last_recorded = state.last_seq
        pause = FIRST_PAUSE_SECONDS
        while state.messages and state.first_seq <= last_recorded:
            await self._clock.sleep(pause)
            pause = min(pause * 2, MAX_PAUSE_SECONDS)
            state = (await self._js.stream_info(USAGE.name)).state
