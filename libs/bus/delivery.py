"""What a handler is given."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

from google.protobuf.message import Message
from nats.aio.msg import Msg

M = TypeVar("M", bound=Message)


class PoisonMessage(Exception):  # noqa: N818  # named for what it says of the message
    """No attempt can ever handle this message: it is taken off the queue, counted and logged."""


@dataclass(frozen=True, kw_only=True)
class Delivery(Generic[M]):
    """One delivery of a message; there may be others of the same message, even at the same time.

    Attributes:
        message: the event.
        subject: where it was published.
        attempt: the delivery's count, from 1.
        message_id: as it was published.
        headers: all headers, `traceparent` among them.
        error: why the last attempt failed, for `on_exhausted`; None where its worker died.
    """

    message: M
    subject: str
    attempt: int
    message_id: str
    headers: Mapping[str, str]
    error: Exception | None = None
    _raw: Msg = field(repr=False)

    async def in_progress(self) -> None:
        """Tells the server now that the work goes on; it is told regularly in any case."""
        await self._raw.in_progress()


Handler: TypeAlias = Callable[[Delivery[M]], Awaitable[None]]
