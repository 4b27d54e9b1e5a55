"""Messages to all processes that listen now. They are not stored, so others never receive them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import nats.errors
import structlog
from google.protobuf.message import DecodeError, Message
from nats.aio.client import Client
from nats.aio.msg import Msg
from prometheus_client import Counter

from libs.bus.subjects import BROADCAST_TYPES

_log = structlog.get_logger()

_FAILURES = Counter(
    "headrace_bus_broadcast_failures",
    "Broadcasts that could not be sent, read or handled.",
    ["subject"],
)

M = TypeVar("M", bound=Message)


class Broadcaster:
    """Sends broadcasts."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def publish(self, subject: str, message: Message) -> None:
        """Tries to send a message; a failure is logged and counted, not raised."""
        try:
            await self._client.publish(subject, message.SerializeToString())
        except nats.errors.Error as error:
            _FAILURES.labels(subject).inc()
            _log.warning("broadcast not sent", subject=subject, error=error)


async def listen(client: Client, subject: str, handle: Callable[[M], None]) -> None:
    """Calls `handle` with each message from now on, also after reconnects.

    A message that cannot be read or handled is logged, counted and skipped.

    Args:
        client: the connection.
        subject: one of `BROADCAST_TYPES`.
        handle: must not block.
    """
    message_type = BROADCAST_TYPES[subject]

    async def on_message(raw: Msg) -> None:
        try:
            handle(cast("M", message_type.FromString(raw.data)))
        except DecodeError:
            _FAILURES.labels(subject).inc()
            _log.error("broadcast cannot be read", subject=subject)
        except Exception:  # noqa: BLE001  # the next message may be handled
            _FAILURES.labels(subject).inc()
            _log.exception("broadcast not handled", subject=subject)

    await client.subscribe(subject, cb=on_message)
