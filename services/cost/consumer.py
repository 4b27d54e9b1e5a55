"""Books the usage events of the bus."""

from __future__ import annotations

from collections.abc import Sequence

import structlog
from headrace.events.v1 import events_pb2
from prometheus_client import Counter

from libs.bus.delivery import Delivery, PoisonMessage
from services.cost.domain import InvalidUsageError, Usage
from services.cost.ledger import Ledger
from services.cost.wire import usage_from_event

_log = structlog.get_logger()

_REJECTED = Counter(
    "headrace_cost_usage_rejected",
    "Usage events that can never be booked, by what is wrong: see the log.",
    ["reason"],
)


class UsageConsumer:
    """Handles messages with usage events."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def handle(
        self, delivery: Delivery[events_pb2.UsageRecorded | events_pb2.UsageBatchRecorded]
    ) -> None:
        """Books one event, or all of a batch; returns when the ledger has them.

        Raises:
            PoisonMessage: an event can never be booked, and the log has all of it; the others of
                its batch are booked.
            Unavailable: the database does not answer; the message is tried again.
        """
        usages: list[Usage] = []
        rejected: InvalidUsageError | None = None
        for event in _events(delivery.message):
            try:
                usages.append(_checked_usage(event))
            except InvalidUsageError as error:
                _REJECTED.labels(error.reason).inc()
                _log.error(
                    "usage that cannot be booked",
                    usage=str(event),
                    reason=error.reason,
                    error=str(error),
                )
                rejected = error
        await self._ledger.book(*usages)
        for usage in usages:
            _log.debug(
                "usage booked",
                usage_id=usage.usage_id,
                request_id=usage.request_id,
                tenant=usage.tenant,
                model_version=usage.model_version,
                cost_nano_usd=usage.cost_nano_usd,
            )
        if rejected is not None:
            raise PoisonMessage(str(rejected)) from rejected


def _events(
    message: events_pb2.UsageRecorded | events_pb2.UsageBatchRecorded,
) -> Sequence[events_pb2.UsageRecorded]:
    if isinstance(message, events_pb2.UsageBatchRecorded):
        return message.records
    return [message]


def _checked_usage(event: events_pb2.UsageRecorded) -> Usage:
    usage = usage_from_event(event)
    usage.check()
    return usage
