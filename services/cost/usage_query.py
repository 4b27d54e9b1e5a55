"""What `QueryUsage` can ask for, and its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from libs.errors import InvalidArgument


class Dimension(StrEnum):
    """What usage can be grouped and filtered by, in the order in which rows are sorted.

    The names are those of the contract; the values are the columns.
    """

    TENANT = "tenant"
    USER = "user"
    MODEL = "model"
    MODEL_VERSION = "model_version"
    OPERATION = "operation"


class TimeBucket(StrEnum):
    """Spans of time in UTC; the names are those of the contract."""

    HOUR = "hour"
    DAY = "day"


@dataclass(frozen=True, kw_only=True)
class UsageQuery:
    """Which usage to sum up, and in which groups.

    Attributes:
        conditions: the value of each dimension that is filtered. Without a tenant: all tenants.
        start_time: usage at or after it; None: from the first on.
        end_time: usage before it; None: until now.
        group_by: one row for each combination of these, in the order of `Dimension`.
        bucket: one row for each of these spans, too.
    """

    conditions: Mapping[Dimension, str]
    start_time: datetime | None = None
    end_time: datetime | None = None
    group_by: tuple[Dimension, ...] = (Dimension.TENANT, Dimension.USER, Dimension.MODEL)
    bucket: TimeBucket | None = None

    def check(self) -> None:
        """Checks that the range of time is not empty.

        Raises:
            InvalidArgument: it ends before it starts.
        """
        if self.start_time and self.end_time and self.start_time >= self.end_time:
            raise InvalidArgument.of_field("end_time", "must be after start_time")


@dataclass(frozen=True, kw_only=True)
class UsageTotals:
    """Sums of usage. `cost_nano_usd` may exceed 64 bits."""

    request_count: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    cost_nano_usd: int


@dataclass(frozen=True, kw_only=True)
class UsageRow:
    """The usage of one group.

    Attributes:
        bucket_start_time: the start of its time bucket, where the query has buckets.
        group: its value of each dimension that the query groups by.
    """

    totals: UsageTotals
    bucket_start_time: datetime | None = None
    group: Mapping[Dimension, str] = field(default_factory=dict)
