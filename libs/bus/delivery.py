"""The argument of handlers, and the error for messages that cannot be handled."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

from google.protobuf.message import Message
from nats.aio.msg import Msg

M = TypeVar("M", bound=Message)


class PoisonMessage(Exception):  # noqa: N818  # named for what it says of the message
    """No attempt can handle this message: it is removed from the queue, counted and logged.

    Its text must not quote the message.
    """

    has_plain_message = True


@dataclass(frozen=True, kw_only=True)
class Delivery(Generic[M]):
    """One delivery of a message, which may be delivered again, even at the same time.

    Attributes:
        message: the event.
        subject: the subject of the message.
        attempt: number of the delivery, from 1.
        message_id: the ID set by the publisher.
        headers: all headers, `traceparent` among them.
        error: error of the last attempt, for `on_exhausted`; None if its worker died.
    """

    message: M
    subject: str
    attempt: int
    message_id: str
    headers: Mapping[str, str]
    error: Exception | None = None
    _raw: Msg = field(repr=False)

    async def in_progress(self) -> None:
        """Reports now that the handler is running; regular heartbeats do the same."""
        await self._raw.in_progress()


Handler: TypeAlias = Callable[[Delivery[M]], Awaitable[None]]
