"""Usage events: priced here, acknowledged by JetStream, booked by `cost`."""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf import timestamp_pb2
from headrace.common.v1 import model_pb2
from headrace.events.v1 import events_pb2
from prometheus_client import Counter

from libs.bus.publisher import Publisher
from libs.clock import Clock
from libs.ids import uuid7
from libs.metering.batches import UsageBatches
from libs.metering.prices import PriceBook
from libs.metering.pricing import bill, total_nano_usd
from libs.rpc.identity import Identity

_UNPRICED = Counter(
    "headrace_metering_unpriced_requests", "Requests of models that have no price.", ["model"]
)

# A restart of the bus shorter than this is not seen by callers.
ACK_TIMEOUT_SECONDS = 10.0


class UsageRecorder:
    """Prices what a request used and makes it durable."""

    def __init__(
        self, publisher: Publisher, clock: Clock, *, prices: Callable[[], PriceBook]
    ) -> None:
        """Prepares; `prices` returns the price book in force."""
        self._batches = UsageBatches(publisher, timeout_seconds=ACK_TIMEOUT_SECONDS)
        self._clock = clock
        self._prices = prices

    async def record(
        self,
        *,
        request_id: str,
        identity: Identity,
        model: str,
        model_version: str,
        usage: model_pb2.TokenUsage,
        operation: str,
    ) -> int:
        """Returns the cost in nano-USD, once JetStream has acknowledged the event.

        Args:
            request_id: the request; one request may use tokens more than once.
            identity: who pays.
            model: the public name, under which the price is found.
            model_version: what was served.
            usage: the tokens.
            operation: `generate` or `embed`.

        Raises:
            Unavailable: the bus did not acknowledge in time.
            ResourceExhausted: the stream of usage events is full.
        """
        now = self._clock.now()
        price = self._prices().price_of(model, now)
        if price is None:
            _UNPRICED.labels(model).inc()
        cost_nano_usd = total_nano_usd(bill(usage, price))
        event_time = timestamp_pb2.Timestamp(
            seconds=int(now.timestamp()), nanos=1000 * now.microsecond
        )
        usage_id = identity.usage_id or uuid7(self._clock)
        event = events_pb2.UsageRecorded(
            usage_id=usage_id,
            request_id=request_id,
            identity=identity.to_proto(),
            model_version=model_version,
            model=model,
            usage=usage,
            price=price.name if price else "",
            cost_nano_usd=cost_nano_usd,
            event_time=event_time,
            operation=operation,
        )
        await self._batches.publish(event)
        return cost_nano_usd

    async def drain(self) -> None:
        """Returns when all that was recorded is durable, or has failed."""
        await self._batches.drain()
