"""Between protos and the domain: prices, usage events and postings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp
from headrace.common.v1 import usage_pb2
from headrace.cost.v1 import cost_pb2
from headrace.events.v1 import events_pb2

from libs.errors import InvalidArgument
from libs.metering.prices import USAGE_KINDS
from libs.metering.pricing import MAX_PER_QUANTITY, Rate, UsageKind
from libs.rpc.filter import filter_error, parse_filter
from libs.rpc.names import parse_tenant_name, tenant_id, tenant_name
from libs.timestamps import to_timestamp
from services.cost.domain import (
    InvalidUsageError,
    Posting,
    PostingKind,
    Price,
    Usage,
    checked_sum,
)
from services.cost.store import PriceFilter, RequestCost

_KIND_VALUES: Mapping[UsageKind, usage_pb2.UsageKind.ValueType] = {
    kind: usage_pb2.UsageKind.Value(f"USAGE_KIND_{kind.name}") for kind in UsageKind
}
_POSTING_KINDS: Mapping[PostingKind, cost_pb2.PostingKind.ValueType] = {
    kind: cost_pb2.PostingKind.Value(f"POSTING_KIND_{kind.name}") for kind in PostingKind
}
_OPERATION_PREFIX = "OPERATION_"


def price_from_proto(message: cost_pb2.Price, *, create_time: datetime) -> Price:
    """Reads a price that is to be created.

    Raises:
        InvalidArgument: the tenant, a kind of usage or `effective_time` is invalid.
    """
    return Price(
        name=message.name,
        model=message.model,
        tenant=parse_tenant_name(message.tenant, field="price.tenant") if message.tenant else "",
        rates=_rates_from_proto(message.rates),
        effective_time=(
            time_from_proto(message.effective_time, field="price.effective_time")
            if message.HasField("effective_time")
            else None
        ),
        create_time=create_time,
    )


def price_to_proto(price: Price) -> cost_pb2.Price:
    """Writes a price, its rates in the order of the kinds."""
    return cost_pb2.Price(
        name=price.name,
        model=price.model,
        tenant=tenant_name(price.tenant) if price.tenant else "",
        rates=[
            cost_pb2.Rate(kind=_KIND_VALUES[kind], **price.rates[kind]._asdict())
            for kind in UsageKind
            if kind in price.rates
        ],
        effective_time=to_timestamp(price.effective_time) if price.effective_time else None,
        create_time=to_timestamp(price.create_time),
    )


def price_filter_from_proto(text: str, *, visible_to: str | None) -> PriceFilter:
    """Reads the filter of `ListPrices`; `visible_to` is the tenant of a caller without `billing`.

    Raises:
        InvalidArgument: the filter is invalid.
    """
    conditions = parse_filter(text, fields=("model", "tenant"))
    tenant = conditions.get("tenant")
    if tenant and tenant_id(tenant) == tenant:
        raise filter_error("the value of tenant must be tenants/TENANT, or empty")
    return PriceFilter(
        model=conditions.get("model"),
        tenant=None if tenant is None else tenant_id(tenant),
        visible_to=visible_to,
    )


def usage_from_event(event: events_pb2.UsageRecorded) -> Usage:
    """Reads a usage event.

    Raises:
        InvalidUsageError: it has no valid time.
    """
    if not event.HasField("event_time"):
        raise InvalidUsageError("incomplete", "event_time is required")
    try:
        event_time = event.event_time.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidUsageError("incomplete", "event_time is out of range") from error
    return Usage(
        usage_id=event.usage_id,
        request_id=event.request_id,
        # Events that an earlier version recorded have the tenant without its prefix.
        tenant=tenant_id(event.identity.tenant),
        user=event.identity.user,
        model=event.model,
        model_version=event.model_version,
        operation=operation_from_proto(event.operation),
        prompt_tokens=event.usage.prompt_tokens,
        completion_tokens=event.usage.completion_tokens,
        cached_tokens=event.usage.cached_tokens,
        reasoning_tokens=event.usage.reasoning_tokens,
        price=event.price,
        cost_nano_usd=event.cost_nano_usd,
        event_time=event_time,
    )


def request_cost_to_proto(request_id: str, cost: RequestCost) -> cost_pb2.GetRequestCostResponse:
    """Writes the postings of a request and their sum."""
    return cost_pb2.GetRequestCostResponse(
        request_id=request_id,
        cost_nano_usd=checked_sum(
            [posting.cost_nano_usd for posting in cost.postings], field="request_id"
        ),
        postings=[_posting_to_proto(posting) for posting in cost.postings],
        tenant=tenant_name(cost.tenant),
        user=cost.user,
        model_version=cost.model_version,
    )


def operation_from_proto(value: usage_pb2.Operation.ValueType) -> str:
    """Returns the text under which an operation is stored.

    Its name in lower case without the prefix; empty where it is unspecified; the number of one
    that a later version added, so that its usage is booked and nothing is lost.
    """
    if value == usage_pb2.OPERATION_UNSPECIFIED:
        return ""
    if value not in usage_pb2.Operation.values():
        return str(value)
    return usage_pb2.Operation.Name(value).removeprefix(_OPERATION_PREFIX).lower()


def operation_to_proto(text: str) -> usage_pb2.Operation.ValueType:
    """Returns the operation that is stored under a text."""
    if not text:
        return usage_pb2.OPERATION_UNSPECIFIED
    if text.isdecimal():
        return int(text)  # type: ignore[return-value]  # of a later version
    return usage_pb2.Operation.Value(_OPERATION_PREFIX + text.upper())


def time_from_proto(stamp: Timestamp, *, field: str) -> datetime:
    """Reads a time.

    Raises:
        InvalidArgument: it is out of the range that protobuf allows.
    """
    try:
        return stamp.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidArgument.of_field(field, "must be a time in the years 1 to 9999") from error


def _rates_from_proto(messages: Iterable[cost_pb2.Rate]) -> Mapping[UsageKind, Rate]:
    rates: dict[UsageKind, Rate] = {}
    for position, message in enumerate(messages):
        kind = USAGE_KINDS.get(message.kind)
        field = f"price.rates[{position}].kind"
        if kind is None:
            raise InvalidArgument.of_field(field, "must be a kind of usage")
        if kind in rates:
            raise InvalidArgument.of_field(field, f"{kind.value} has another rate already")
        rates[kind] = Rate(message.nano_usd, message.per_quantity or MAX_PER_QUANTITY)
    return rates


def _posting_to_proto(posting: Posting) -> cost_pb2.Posting:
    return cost_pb2.Posting(
        kind=_POSTING_KINDS[posting.kind],
        usage_kind=(
            _KIND_VALUES[posting.usage_kind]
            if posting.usage_kind
            else usage_pb2.USAGE_KIND_UNSPECIFIED
        ),
        quantity=posting.quantity,
        price=posting.price,
        rate_nano_usd=posting.rate_nano_usd,
        rate_per_quantity=posting.rate_per_quantity,
        cost_nano_usd=posting.cost_nano_usd,
        usage_id=posting.usage_id,
    )
