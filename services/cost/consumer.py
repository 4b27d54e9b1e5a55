"""From the bus into the ledger."""

from __future__ import annotations

import structlog
from headrace.events.v1 import events_pb2

from libs.bus.delivery import Delivery, PoisonMessage
from services.cost.domain import InvalidUsageError
from services.cost.ledger import Ledger
from services.cost.wire import usage_from_event

_log = structlog.get_logger()


class UsageConsumer:
    """Handles usage events; done when the ledger has them."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def handle(self, delivery: Delivery[events_pb2.UsageRecorded]) -> None:
        """Books one event.

        Raises:
            PoisonMessage: nobody can book it; the log has all of it.
            Unavailable: the database does not answer; it is tried again.
        """
        event = delivery.message
        try:
            await self._ledger.book(usage_from_event(event))
        except InvalidUsageError as error:
            _log.error("usage that cannot be booked", usage=str(event), error=str(error))
            raise PoisonMessage(str(error)) from error
        _log.debug(  # the ledger has it
            "usage booked",
            usage_id=event.usage_id,
            request_id=event.request_id,
            tenant=event.identity.tenant,
            model_version=event.model_version,
            cost_nano_usd=event.cost_nano_usd,
        )
