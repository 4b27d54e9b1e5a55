"""Usage events as a request leaves them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

import pytest
from headrace.common.v1 import usage_pb2
from headrace.cost.v1 import cost_pb2
from headrace.events.v1 import events_pb2

from libs.bus.publisher import Publisher
from libs.clock import SystemClock
from libs.metering.prices import PriceBook
from libs.metering.usage import OPERATIONS, UsageRecorder
from libs.rpc.identity import Identity

USAGE = usage_pb2.TokenUsage(prompt_tokens=10, cached_tokens=4, completion_tokens=2)


class FakePublisher:
    """Keeps what is published."""

    def __init__(self) -> None:
        self.events: list[events_pb2.UsageRecorded] = []

    async def publish(self, _subject: str, event: events_pb2.UsageRecorded, **_options: Any):
        self.events.append(event)


def price(name: str, nano_usd: int, tenant: str = "") -> cost_pb2.Price:
    kind = usage_pb2.USAGE_KIND_COMPLETION_TOKENS
    made = cost_pb2.Price(
        name=name,
        model="smollm2",
        tenant=tenant,
        rates=[cost_pb2.Rate(kind=kind, nano_usd=nano_usd, per_quantity=1)],
    )
    made.create_time.FromDatetime(datetime(2026, 1, 1, tzinfo=UTC))
    return made


BOOK = PriceBook([price("prices/general", 5), price("prices/own", 3, "tenants/acme")])


async def record(
    *, tenant: str = "acme", operation: str = "generate", model: str = "smollm2"
) -> tuple[int, events_pb2.UsageRecorded]:
    """Records a usage; returns the cost and the event."""
    publisher = FakePublisher()
    recorder = UsageRecorder(cast("Publisher", publisher), SystemClock(), prices=lambda: BOOK)
    cost = await recorder.record(
        request_id="request",
        identity=Identity(tenant, "ann"),
        model=model,
        model_version="models/smollm2/versions/1.0.0",
        usage=USAGE,
        operation=operation,
    )
    await recorder.drain()
    (event,) = publisher.events
    return cost, event


async def test_a_tenant_pays_its_own_price():
    """Others pay the general one; the event names the price."""
    cost, event = await record()
    assert (cost, event.price, event.cost_nano_usd) == (6, "prices/own", 6)

    cost, event = await record(tenant="other")
    assert (cost, event.price, event.cost_nano_usd) == (10, "prices/general", 10)


async def test_a_model_without_price_is_free():
    """Its usage is recorded all the same."""
    cost, event = await record(model="unpriced")
    assert (cost, event.price, event.usage) == (0, "", USAGE)


async def test_an_event_has_the_shapes_of_the_contract():
    """The tenant by its resource name."""
    _, event = await record(operation="embed")
    assert event.identity == events_pb2.Identity(tenant="tenants/acme", user="ann")
    assert event.operation == usage_pb2.OPERATION_EMBED
    assert event.usage_id
    assert event.HasField("event_time")


@pytest.mark.parametrize("name", ["generate", "embed", "infer"])
def test_every_operation_has_a_name(name: str):
    """Those that services use."""
    assert OPERATIONS[name] == usage_pb2.Operation.Value(f"OPERATION_{name.upper()}")
