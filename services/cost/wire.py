"""Between protos and the domain."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp
from headrace.cost.v1 import cost_pb2
from headrace.events.v1 import events_pb2

from libs.errors import InvalidArgument
from services.cost.domain import InvalidUsageError, Posting, Price, Usage, UsageSum, checked_sum
from services.cost.store import RequestCost


def price_from_proto(message: cost_pb2.Price, *, create_time: datetime) -> Price:
    """Reads a price that is to be created.

    Raises:
        InvalidArgument: `effective_time` is no time.
    """
    return Price(
        name=message.name,
        model=message.model,
        input_nano_usd_per_million_tokens=message.input_nano_usd_per_million_tokens,
        cached_input_nano_usd_per_million_tokens=message.cached_input_nano_usd_per_million_tokens,
        output_nano_usd_per_million_tokens=message.output_nano_usd_per_million_tokens,
        effective_time=(
            time_from_proto(message.effective_time, field="price.effective_time")
            if message.HasField("effective_time")
            else None
        ),
        create_time=create_time,
    )


def price_to_proto(price: Price) -> cost_pb2.Price:
    """Writes a price; `effective_time` stays unset where it was."""
    return cost_pb2.Price(
        name=price.name,
        model=price.model,
        input_nano_usd_per_million_tokens=price.input_nano_usd_per_million_tokens,
        cached_input_nano_usd_per_million_tokens=price.cached_input_nano_usd_per_million_tokens,
        output_nano_usd_per_million_tokens=price.output_nano_usd_per_million_tokens,
        effective_time=_time_to_proto(price.effective_time) if price.effective_time else None,
        create_time=_time_to_proto(price.create_time),
    )


def usage_from_event(event: events_pb2.UsageRecorded) -> Usage:
    """Reads a usage event.

    Raises:
        InvalidUsageError: it does not say when.
    """
    if not event.HasField("event_time"):
        raise InvalidUsageError("event_time must be given")
    try:
        event_time = event.event_time.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidUsageError("event_time is no time") from error
    return Usage(
        usage_id=event.usage_id,
        request_id=event.request_id,
        tenant=event.identity.tenant,
        user=event.identity.user,
        model=event.model,
        model_version=event.model_version,
        operation=event.operation,
        prompt_tokens=event.usage.prompt_tokens,
        completion_tokens=event.usage.completion_tokens,
        cached_tokens=event.usage.cached_tokens,
        price=event.price,
        cost_nano_usd=event.cost_nano_usd,
        event_time=event_time,
    )


def request_cost_to_proto(request_id: str, cost: RequestCost) -> cost_pb2.GetRequestCostResponse:
    """Writes the lines of a request and their sum."""
    return cost_pb2.GetRequestCostResponse(
        request_id=request_id,
        cost_nano_usd=checked_sum(
            [line.cost_nano_usd for line in cost.postings], field="request_id"
        ),
        postings=[_posting_to_proto(line) for line in cost.postings],
        tenant=cost.tenant,
        user=cost.user,
        model_version=cost.model_version,
    )


def usage_row_to_proto(row: UsageSum) -> cost_pb2.UsageRow:
    """Writes one row of sums."""
    return cost_pb2.UsageRow(
        tenant=row.tenant,
        user=row.user,
        model=row.model,
        request_count=row.request_count,
        prompt_tokens=row.prompt_tokens,
        completion_tokens=row.completion_tokens,
        cached_tokens=row.cached_tokens,
        cost_nano_usd=row.cost_nano_usd,
    )


def time_from_proto(stamp: Timestamp, *, field: str) -> datetime:
    """Reads a time.

    Raises:
        InvalidArgument: it is out of the range that protobuf allows.
    """
    try:
        return stamp.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidArgument.of_field(field, "must be a time in the years 1 to 9999") from error


def _posting_to_proto(posting: Posting) -> cost_pb2.Posting:
    return cost_pb2.Posting(
        kind=posting.kind,
        quantity_tokens=posting.quantity_tokens,
        price=posting.price,
        nano_usd_per_million_tokens=posting.nano_usd_per_million_tokens,
        cost_nano_usd=posting.cost_nano_usd,
        usage_id=posting.usage_id,
    )


def _time_to_proto(moment: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp
