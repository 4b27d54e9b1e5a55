"""Pulls messages of a durable consumer when there is room, and resumes after interruptions.

It uses the pull protocol directly, because `fetch(n)` of nats-py returns no message until `n` have
arrived or its timeout has passed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping

import nats.errors
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext

from libs.bus.connection import client_of, ensure_consumer
from libs.bus.subjects import Consumer

_log = structlog.get_logger()

# Lifetime of a request for messages, during which the server sends heartbeats.
REQUEST_SECONDS = 30.0
HEARTBEAT_SECONDS = 1.0
# After this time without heartbeats, server or consumer are lost, and the request with them.
SILENCE_LIMIT_SECONDS = 2.5
# How often reconnects are detected.
CHECK_SECONDS = 0.5
RESTART_PAUSE_SECONDS = 0.2
UNSUBSCRIBE_TIMEOUT_SECONDS = 2.0

_HEARTBEAT = "100"
_PENDING_HEADER = "Nats-Pending-Messages"


class Pull:
    """Pulls messages of one consumer and passes each to `take` immediately.

    Args:
        js: JetStream.
        consumer: created with its stream whenever it is missing.
        room: returns how many messages can be taken now; no more are requested.
        take: called with each message; must not block.
    """

    def __init__(
        self,
        js: JetStreamContext,
        consumer: Consumer,
        *,
        room: Callable[[], int],
        take: Callable[[Msg], None],
    ) -> None:
        self._js = js
        self._client = client_of(js)
        self._consumer = consumer
        self._room = room
        self._take = take
        self._next = f"$JS.API.CONSUMER.MSG.NEXT.{consumer.stream.name}.{consumer.name}"
        self._changed = asyncio.Event()
        self._requested = 0
        self._heard_at = 0.0
        self._lost_because = ""

    def wake(self) -> None:
        """Checks again whether there is room."""
        self._changed.set()

    async def run(self) -> None:
        """Pulls until it is cancelled.

        Raises:
            nats.errors.ConnectionClosedError: the client was closed for good.
            nats.js.errors.APIError: the consumer cannot be created.
        """
        while True:
            await ensure_consumer(self._js, self._consumer)
            await self._pull_until_lost()
            _log.warning("pulling again", consumer=self._consumer.name, because=self._lost_because)
            await asyncio.sleep(RESTART_PAUSE_SECONDS)

    async def _pull_until_lost(self) -> None:
        loop = asyncio.get_running_loop()
        inbox = self._client.new_inbox()
        subscription = await self._client.subscribe(inbox, cb=self._on_message)
        self._requested, self._lost_because = 0, ""
        reconnects = self._client.stats["reconnects"]
        try:
            while not self._lost_because:
                self._changed.clear()
                await self._ask(inbox)
                try:
                    async with asyncio.timeout(CHECK_SECONDS):
                        await self._changed.wait()
                except TimeoutError:
                    pass
                if self._client.stats["reconnects"] != reconnects:
                    self._lost_because = "the connection was lost"
                elif self._requested and loop.time() - self._heard_at > SILENCE_LIMIT_SECONDS:
                    self._lost_because = "the server was silent"
        finally:
            await self._unsubscribe(subscription)

    async def _ask(self, inbox: str) -> None:
        room = self._room()
        wanted = room - self._requested
        # Requesting at least half of the room at a time halves the requests of a busy consumer.
        if wanted <= 0 or self._requested > room // 2:
            return
        if not self._requested:
            self._heard_at = asyncio.get_running_loop().time()
        self._requested += wanted
        request = {
            "batch": wanted,
            "expires": int(REQUEST_SECONDS * 1e9),
            "idle_heartbeat": int(HEARTBEAT_SECONDS * 1e9),
        }
        await self._client.publish(self._next, json.dumps(request).encode(), reply=inbox)

    async def _on_message(self, message: Msg) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        if message.reply:  # messages have a reply subject for the ack, status messages do not
            self._requested -= 1
            self._take(message)
        else:
            self._on_status(message.headers or {})
        self._changed.set()

    def _on_status(self, headers: Mapping[str, str]) -> None:
        status = headers.get("Status", "")
        if status == _HEARTBEAT:
            return
        unanswered = headers.get(_PENDING_HEADER)
        if unanswered is not None:  # this request has ended; others may be open
            self._requested -= int(unanswered)
        else:
            self._lost_because = f"{status} {headers.get('Description', '')}".strip()

    async def _unsubscribe(self, subscription: Subscription) -> None:
        """Unsubscribes from the inbox after the messages in transit have been taken."""
        try:
            if self._client.is_connected:
                async with asyncio.timeout(UNSUBSCRIBE_TIMEOUT_SECONDS):
                    await subscription.drain()  # type: ignore[no-untyped-call]  # has no types
            else:
                await subscription.unsubscribe()
        except (nats.errors.Error, TimeoutError) as error:
            _log.debug("inbox not closed", error=error)
