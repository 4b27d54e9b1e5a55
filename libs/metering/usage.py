"""Usage events: priced here, acknowledged by JetStream, booked by `cost`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from google.protobuf import timestamp_pb2
from headrace.common.v1 import usage_pb2
from headrace.events.v1 import events_pb2
from prometheus_client import Counter

from libs.bus.publisher import Publisher
from libs.clock import Clock
from libs.ids import uuid7
from libs.metering.batches import UsageBatches
from libs.metering.prices import PriceBook
from libs.metering.pricing import MAX_INT64, Rates, token_quantities, total_nano_usd
from libs.rpc.identity import Identity

_UNPRICED = Counter(
    "headrace_metering_unpriced_requests", "Requests of models that have no price.", ["model"]
)

# Operations by their names in lower case: `generate`, `embed`, `infer`.
OPERATIONS: Mapping[str, usage_pb2.Operation.ValueType] = {
    name.removeprefix("OPERATION_").lower(): value for name, value in usage_pb2.Operation.items()
}

# Callers do not notice when the bus restarts in less than this.
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
        usage: usage_pb2.TokenUsage,
        operation: str,
    ) -> int:
        """Returns the cost in nano-USD, once JetStream has acknowledged the event.

        Args:
            request_id: the request; one request may use tokens more than once.
            identity: who pays.
            model: the public name, which has the price.
            model_version: `models/{model}/versions/{semver}`.
            usage: the tokens.
            operation: what the request did, a key of `OPERATIONS`.

        Raises:
            Unavailable: the bus did not acknowledge in time.
            ResourceExhausted: the stream of usage events is full.
        """
        now = self._clock.now()
        price = self._prices().price_of(model, now, tenant=identity.tenant)
        cost_nano_usd = 0
        if price is None:
            _UNPRICED.labels(model).inc()
        else:
            cost_nano_usd = cost_of(usage, price.rates)
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
            operation=OPERATIONS[operation],
        )
        await self._batches.publish(event)
        return cost_nano_usd

    async def drain(self) -> None:
        """Returns when all that was recorded is durable, or has failed."""
        await self._batches.drain()


def cost_of(usage: usage_pb2.TokenUsage, rates: Rates) -> int:
    """Returns the cost in nano-USD, at most the greatest number of an int64.

    Only a backend that reports impossible counts reaches that limit, and the ledger rejects those.
    """
    quantities = token_quantities(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
    )
    return min(total_nano_usd(quantities, rates), MAX_INT64)
