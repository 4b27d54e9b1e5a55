"""From the bus into the ledger."""

from __future__ import annotations

from collections.abc import Sequence

import structlog
from headrace.events.v1 import events_pb2

from libs.bus.delivery import Delivery, PoisonMessage
from services.cost.domain import InvalidUsageError, Usage
from services.cost.ledger import Ledger
from services.cost.wire import usage_from_event

_log = structlog.get_logger()


class UsageConsumer:
    """Handles usage events; done when the ledger has them."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def handle(
        self, delivery: Delivery[events_pb2.UsageRecorded | events_pb2.UsageBatchRecorded]
    ) -> None:
        """Books one event, or all of a batch.

        Raises:
            PoisonMessage: nobody can book it, or one of the batch, whose others are booked; the log
                has all of it.
            Unavailable: the database does not answer; it is tried again.
        """
        usages: list[Usage] = []
        refused: InvalidUsageError | None = None
        for event in _events(delivery.message):
            try:
                usages.append(_sound_usage(event))
            except InvalidUsageError as error:
                _log.error("usage that cannot be booked", usage=str(event), error=str(error))
                refused = error
        await self._ledger.book(*usages)
        for usage in usages:
            _log.debug(  # the ledger has it
                "usage booked",
                usage_id=usage.usage_id,
                request_id=usage.request_id,
                tenant=usage.tenant,
                model_version=usage.model_version,
                cost_nano_usd=usage.cost_nano_usd,
            )
        if refused is not None:
            raise PoisonMessage(str(refused)) from refused


def _events(
    message: events_pb2.UsageRecorded | events_pb2.UsageBatchRecorded,
) -> Sequence[events_pb2.UsageRecorded]:
    if isinstance(message, events_pb2.UsageBatchRecorded):
        return message.records
    return [message]


def _sound_usage(event: events_pb2.UsageRecorded) -> Usage:
    usage = usage_from_event(event)
    usage.check()
    return usage
