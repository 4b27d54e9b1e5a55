"""Usage events like those of inference, and a client of the cost service."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from headrace.common.v1 import usage_pb2
from headrace.cost.v1 import cost_internal_pb2, cost_internal_pb2_grpc, cost_pb2, cost_pb2_grpc
from headrace.events.v1 import events_pb2

from libs.bus.connection import connect, ensure_streams
from libs.bus.publisher import Publisher
from libs.bus.subjects import USAGE_RECORDED
from libs.clock import SystemClock
from libs.ids import uuid7
from libs.metering.prices import rates_of
from libs.metering.usage import cost_of
from libs.rpc.identity import Identity

READ = frozenset({"read"})
ANN = Identity("acme", "ann", READ)
BILLING = Identity("acme", "root", READ | {"billing"})
EVE = Identity("evil", "eve", READ)
INTERNAL = Identity("headrace", "inference", frozenset({"internal"}))
PRICE = cost_pb2.Price(
    name="prices/smollm2-1",
    model="smollm2",
    rates=[
        cost_pb2.Rate(
            kind=usage_pb2.USAGE_KIND_PROMPT_TOKENS, nano_usd=123_456_789, per_quantity=1_000_000
        ),
        cost_pb2.Rate(
            kind=usage_pb2.USAGE_KIND_CACHED_PROMPT_TOKENS,
            nano_usd=12_345_678,
            per_quantity=1_000_000,
        ),
        cost_pb2.Rate(
            kind=usage_pb2.USAGE_KIND_COMPLETION_TOKENS,
            nano_usd=987_654_321,
            per_quantity=1_000_000,
        ),
    ],
)


def free(name: str, model: str, **fields: Any) -> cost_pb2.Price:
    """Makes a price whose amounts do not matter."""
    rates = [cost_pb2.Rate(kind=usage_pb2.USAGE_KIND_PROMPT_TOKENS)]
    return cost_pb2.Price(name=f"prices/{name}", model=model, rates=rates, **fields)


def usage_event(
    *,
    prompt_tokens: int = 17,
    completion_tokens: int = 33,
    cached_tokens: int = 5,
    who: Identity = ANN,
    **fields: Any,
) -> events_pb2.UsageRecorded:
    """Makes an event priced with `PRICE`, unless `fields` has another cost."""
    usage = usage_pb2.TokenUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        cached_tokens=cached_tokens,
    )
    now = Timestamp()
    now.FromDatetime(SystemClock().now())
    values: dict[str, Any] = {
        "usage_id": uuid7(SystemClock()),
        "request_id": str(uuid.uuid4()),
        "identity": who.to_proto(),
        "model_version": "models/smollm2/versions/1.0.0",
        "model": "smollm2",
        "usage": usage,
        "price": PRICE.name,
        "cost_nano_usd": cost_of(usage, rates_of(PRICE)),
        "event_time": now,
        "operation": usage_pb2.OPERATION_GENERATE,
    }
    return events_pb2.UsageRecorded(**{**values, **fields})


class CostClient:
    """Calls a cost service.

    Attributes:
        who: the caller, unless a call has another.
    """

    def __init__(self, channel: grpc.aio.Channel, *, who: Identity = ANN) -> None:
        self.stub: cost_pb2_grpc.CostServiceAsyncStub = cost_pb2_grpc.CostServiceStub(channel)
        self.who = who
        self._internal: cost_internal_pb2_grpc.CostInternalServiceAsyncStub = (
            cost_internal_pb2_grpc.CostInternalServiceStub(channel)
        )

    def watch_prices(
        self,
    ) -> grpc.aio.UnaryStreamCall[
        cost_internal_pb2.WatchPricesRequest, cost_internal_pb2.WatchPricesResponse
    ]:
        return self._internal.WatchPrices(
            cost_internal_pb2.WatchPricesRequest(), metadata=INTERNAL.metadata()
        )

    async def prices(
        self, *, who: Identity | None = None, **fields: Any
    ) -> cost_pb2.ListPricesResponse:
        return await self.stub.ListPrices(
            cost_pb2.ListPricesRequest(**fields), metadata=(who or self.who).metadata()
        )

    async def create_price(
        self, price: cost_pb2.Price = PRICE, *, who: Identity = BILLING
    ) -> cost_pb2.Price:
        answer = await self.stub.CreatePrice(
            cost_pb2.CreatePriceRequest(price=price), metadata=who.metadata()
        )
        return answer.price

    async def request_cost(
        self, request_id: str, *, who: Identity | None = None
    ) -> cost_pb2.GetRequestCostResponse:
        return await self.stub.GetRequestCost(
            cost_pb2.GetRequestCostRequest(request_id=request_id),
            metadata=(who or self.who).metadata(),
        )

    async def usage(
        self, *, who: Identity | None = None, **fields: Any
    ) -> cost_pb2.QueryUsageResponse:
        return await self.stub.QueryUsage(
            cost_pb2.QueryUsageRequest(**fields), metadata=(who or self.who).metadata()
        )


class UsageSource:
    """Publishes usage events like a service."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    async def record(self, event: events_pb2.UsageRecorded, *, message_id: str = "") -> None:
        """Publishes an event and waits for the ack; another message ID stores it again."""
        await self._publisher.publish(
            USAGE_RECORDED, event, message_id=message_id or event.usage_id, timeout_seconds=20
        )


@asynccontextmanager
async def usage_source(nats_url: str) -> AsyncIterator[UsageSource]:
    """Connects to the bus; yields a source."""
    client = await connect(nats_url, name="test")
    await ensure_streams(client.jetstream())
    try:
        yield UsageSource(Publisher(client.jetstream()))
    finally:
        await client.drain()
