"""Usage events as the ledger reads them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from headrace.common.v1 import usage_pb2
from headrace.events.v1 import events_pb2

from services.cost.domain import InvalidUsageError, Usage
from services.cost.wire import usage_from_event

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)


def event(**fields: Any) -> events_pb2.UsageRecorded:
    values: dict[str, Any] = {
        "usage_id": "usage",
        "request_id": "request",
        "identity": events_pb2.Identity(tenant="tenants/acme", user="ann"),
        "model_version": "models/smollm2/versions/1.0.0",
        "model": "smollm2",
        "usage": usage_pb2.TokenUsage(
            prompt_tokens=10, completion_tokens=5, cached_tokens=4, reasoning_tokens=3
        ),
        "price": "prices/one",
        "cost_nano_usd": 7,
        "event_time": Timestamp(seconds=int(NOW.timestamp())),
        "operation": usage_pb2.OPERATION_EMBED,
    }
    return events_pb2.UsageRecorded(**{**values, **fields})


def test_an_event_is_read_with_all_its_fields():
    """The tenant and the operation as they are stored: plain."""
    usage = usage_from_event(event())
    usage.check()
    assert usage == Usage(
        usage_id="usage",
        request_id="request",
        tenant="acme",
        user="ann",
        model="smollm2",
        model_version="models/smollm2/versions/1.0.0",
        operation="embed",
        prompt_tokens=10,
        completion_tokens=5,
        cached_tokens=4,
        reasoning_tokens=3,
        price="prices/one",
        cost_nano_usd=7,
        event_time=NOW,
    )


def test_an_event_of_an_earlier_version_is_booked():
    """It may wait in the stream while the mesh is updated; its operation was a text."""
    old = event(identity=events_pb2.Identity(tenant="acme", user="ann"))
    old.ClearField("operation")
    text_in_field_10 = b"\x52\x08generate"
    usage = usage_from_event(
        events_pb2.UsageRecorded.FromString(old.SerializeToString() + text_in_field_10)
    )
    usage.check()
    assert (usage.tenant, usage.operation) == ("acme", "")


@pytest.mark.parametrize("time", [None, Timestamp(seconds=2**60)])
def test_an_event_without_a_valid_time_is_rejected(time: Timestamp | None):
    """No report could have it."""
    with pytest.raises(InvalidUsageError) as caught:
        usage_from_event(event(event_time=time))
    assert caught.value.reason == "incomplete"


@pytest.mark.parametrize("tenant", ["", "tenants/"])
def test_an_event_without_a_tenant_is_rejected(tenant: str):
    """An event without a tenant cannot be billed."""
    with pytest.raises(InvalidUsageError) as caught:
        usage_from_event(event(identity=events_pb2.Identity(tenant=tenant))).check()
    assert caught.value.reason == "incomplete"
