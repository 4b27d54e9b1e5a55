"""What `QueryUsage` can ask for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from headrace.common.v1 import usage_pb2
from headrace.cost.v1 import cost_pb2

from libs.errors import InvalidArgument
from libs.metering.pricing import MAX_INT64
from services.cost.usage_query import Dimension, TimeBucket, UsageQuery, UsageRow, UsageTotals
from services.cost.usage_store import UsageSums
from services.cost.usage_wire import query_from_proto, sums_to_proto
from services.cost.wire import operation_from_proto, operation_to_proto

START = datetime(2026, 11, 1, tzinfo=UTC)
OWN = {Dimension.TENANT: "acme"}


def parse(**fields: Any) -> UsageQuery:
    return query_from_proto(cost_pb2.QueryUsageRequest(**fields), caller_tenant="acme")


def totals(cost_nano_usd: int = 0) -> UsageTotals:
    return UsageTotals(
        request_count=1,
        prompt_tokens=2,
        completion_tokens=3,
        cached_tokens=1,
        reasoning_tokens=2,
        cost_nano_usd=cost_nano_usd,
    )


def test_an_empty_query_is_about_the_callers_tenant() -> None:
    """Grouped by tenant, user and model, over all time."""
    assert parse() == UsageQuery(
        conditions=OWN, group_by=(Dimension.TENANT, Dimension.USER, Dimension.MODEL)
    )


def test_all_fields_of_a_query_are_read() -> None:
    """Dimensions in their own order, each once; operations by their names in the contract."""
    query = parse(
        tenant="tenants/other",
        filter='user = "ann" AND operation = "OPERATION_EMBED" AND model_version = "v"',
        group_by=[
            cost_pb2.USAGE_DIMENSION_OPERATION,
            cost_pb2.USAGE_DIMENSION_MODEL,
            cost_pb2.USAGE_DIMENSION_OPERATION,
        ],
        time_bucket=cost_pb2.TIME_BUCKET_DAY,
        start_time=Timestamp(seconds=int(START.timestamp())),
    )
    assert query == UsageQuery(
        conditions={
            Dimension.TENANT: "other",
            Dimension.USER: "ann",
            Dimension.OPERATION: "embed",
            Dimension.MODEL_VERSION: "v",
        },
        group_by=(Dimension.MODEL, Dimension.OPERATION),
        bucket=TimeBucket.DAY,
        start_time=START,
    )


def test_all_tenants_are_selected_by_a_dash() -> None:
    """`tenants/-`, as in AIP-159."""
    assert parse(tenant="tenants/-").conditions == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tenant", "acme"),
        ("tenant", "tenants/"),
        ("filter", 'tenant = "tenants/other"'),
        ("filter", 'operation = "embed"'),
        ("filter", "user"),
        ("group_by", [cost_pb2.USAGE_DIMENSION_UNSPECIFIED]),
        ("group_by", [99]),
        ("time_bucket", 99),
        ("start_time", Timestamp(seconds=2**61)),
    ],
)
def test_a_wrong_query_is_refused_by_field(field: str, value: Any) -> None:
    """Also values of later versions, because they would be answered wrongly."""
    with pytest.raises(InvalidArgument) as caught:
        parse(**{field: value})
    assert [name for name, _ in caught.value.field_violations] == [field]


@pytest.mark.parametrize("length", [timedelta(0), timedelta(days=-1)])
def test_a_range_without_length_is_refused(length: timedelta) -> None:
    """An empty range is a mistake, not a sum of nothing."""
    with pytest.raises(InvalidArgument):
        UsageQuery(conditions=OWN, start_time=START, end_time=START + length).check()


def test_a_row_has_the_values_of_its_group_only() -> None:
    """Other fields are empty; the tenant has its prefix."""
    row = UsageRow(
        bucket_start_time=START,
        group={Dimension.TENANT: "acme", Dimension.OPERATION: "infer"},
        totals=totals(),
    )
    written = sums_to_proto(UsageSums(rows=[row], next_page_token="next", totals=totals()))  # noqa: S106  # of a page
    sums = cost_pb2.UsageTotals(
        request_count=1,
        usage=usage_pb2.TokenUsage(
            prompt_tokens=2, completion_tokens=3, cached_tokens=1, reasoning_tokens=2
        ),
    )
    assert written == cost_pb2.QueryUsageResponse(
        rows=[
            cost_pb2.UsageRow(
                bucket_start_time=Timestamp(seconds=int(START.timestamp())),
                tenant="tenants/acme",
                operation=usage_pb2.OPERATION_INFER,
                totals=sums,
            )
        ],
        next_page_token="next",  # noqa: S106  # of a page
        totals=sums,
    )


def test_a_sum_beyond_64_bits_is_refused() -> None:
    """The request selects too much time."""
    with pytest.raises(InvalidArgument) as caught:
        sums_to_proto(UsageSums(rows=[], next_page_token="", totals=totals(MAX_INT64 + 1)))
    assert [name for name, _ in caught.value.field_violations] == ["start_time"]


@pytest.mark.parametrize("value", [*usage_pb2.Operation.values(), 99])
def test_no_operation_is_lost_on_its_way_through_the_ledger(value: int) -> None:
    """Also one of a later version, by its number."""
    stored = operation_from_proto(value)  # type: ignore[arg-type]  # unknown ones, too
    assert operation_to_proto(stored) == value
