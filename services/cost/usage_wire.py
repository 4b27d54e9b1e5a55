"""Between protos and the domain: `QueryUsage`."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.common.v1 import usage_pb2
from headrace.cost.v1 import cost_pb2

from libs.errors import InvalidArgument
from libs.rpc.filter import filter_error, parse_filter
from libs.rpc.names import TENANTS_PREFIX, parse_tenant_name, tenant_name
from libs.timestamps import to_timestamp
from services.cost.domain import ALL_TENANTS, checked_sum
from services.cost.usage_query import Dimension, TimeBucket, UsageQuery, UsageRow, UsageTotals
from services.cost.usage_store import UsageSums
from services.cost.wire import (
    operation_from_proto,
    operation_to_proto,
    time_from_proto,
)

_DIMENSIONS: Mapping[int, Dimension] = {
    cost_pb2.UsageDimension.Value(f"USAGE_DIMENSION_{each.name}"): each for each in Dimension
}
_BUCKETS: Mapping[int, TimeBucket | None] = {
    cost_pb2.TIME_BUCKET_UNSPECIFIED: None,
    **{cost_pb2.TimeBucket.Value(f"TIME_BUCKET_{each.name}"): each for each in TimeBucket},
}
_FILTER_FIELDS = tuple(each.value for each in Dimension if each is not Dimension.TENANT)


def query_from_proto(request: cost_pb2.QueryUsageRequest, *, caller_tenant: str) -> UsageQuery:
    """Reads a query; without a tenant it is about the caller's.

    Raises:
        InvalidArgument: with the field that is wrong.
    """
    query = UsageQuery(
        conditions={
            **_tenant_condition(request.tenant or tenant_name(caller_tenant)),
            **_filter_conditions(request.filter),
        },
        start_time=(
            time_from_proto(request.start_time, field="start_time")
            if request.HasField("start_time")
            else None
        ),
        end_time=(
            time_from_proto(request.end_time, field="end_time")
            if request.HasField("end_time")
            else None
        ),
        group_by=_group_by(request),
        bucket=_bucket(request.time_bucket),
    )
    query.check()
    return query


def sums_to_proto(sums: UsageSums) -> cost_pb2.QueryUsageResponse:
    """Writes a page of rows and the totals.

    Raises:
        InvalidArgument: a cost does not fit into 64 bits.
    """
    return cost_pb2.QueryUsageResponse(
        totals=_totals_to_proto(sums.totals),  # first: no row costs more
        rows=[_row_to_proto(row) for row in sums.rows],
        next_page_token=sums.next_page_token,
    )


def _tenant_condition(name: str) -> Mapping[Dimension, str]:
    if name == TENANTS_PREFIX + ALL_TENANTS:
        return {}
    return {Dimension.TENANT: parse_tenant_name(name)}


def _filter_conditions(text: str) -> Mapping[Dimension, str]:
    conditions = {
        Dimension(name): value for name, value in parse_filter(text, fields=_FILTER_FIELDS).items()
    }
    operation = conditions.get(Dimension.OPERATION)
    if operation is not None:
        if operation not in usage_pb2.Operation.keys():  # noqa: SIM118  # not a mapping
            known = ", ".join(usage_pb2.Operation.keys())
            raise filter_error(f"the value of operation must be one of {known}")
        conditions[Dimension.OPERATION] = operation_from_proto(usage_pb2.Operation.Value(operation))
    return conditions


def _group_by(request: cost_pb2.QueryUsageRequest) -> tuple[Dimension, ...]:
    if not request.group_by:
        return UsageQuery.group_by
    named = set(request.group_by)
    if not named <= _DIMENSIONS.keys():
        raise InvalidArgument.of_field("group_by", "must have known dimensions only")
    wanted = {_DIMENSIONS[value] for value in named}
    return tuple(each for each in Dimension if each in wanted)


def _bucket(value: int) -> TimeBucket | None:
    if value not in _BUCKETS:
        raise InvalidArgument.of_field("time_bucket", "must be a known span of time, or not set")
    return _BUCKETS[value]


def _row_to_proto(row: UsageRow) -> cost_pb2.UsageRow:
    start = row.bucket_start_time
    group = {dimension.value: value for dimension, value in row.group.items()}
    operation = operation_to_proto(group.pop("operation", ""))
    if "tenant" in group:
        group["tenant"] = tenant_name(group["tenant"])
    return cost_pb2.UsageRow(
        bucket_start_time=to_timestamp(start) if start else None,
        operation=operation,
        totals=_totals_to_proto(row.totals),
        **group,
    )


def _totals_to_proto(totals: UsageTotals) -> cost_pb2.UsageTotals:
    return cost_pb2.UsageTotals(
        request_count=totals.request_count,
        usage=usage_pb2.TokenUsage(
            prompt_tokens=totals.prompt_tokens,
            completion_tokens=totals.completion_tokens,
            cached_tokens=totals.cached_tokens,
            reasoning_tokens=totals.reasoning_tokens,
        ),
        cost_nano_usd=checked_sum([totals.cost_nano_usd], field="start_time"),
    )
