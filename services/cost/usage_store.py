"""Sums of usage, in SQL."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from libs.db import snapshot
from libs.rpc.paging import Page, PageRequest, invalid_page_token
from services.cost.tables import usage
from services.cost.usage_query import Dimension, TimeBucket, UsageQuery, UsageRow, UsageTotals

# Costs are summed up in two parts, since a database's own sum of 64-bit numbers may overflow.
_SPLIT = 1_000_000_000
_BUCKET = "bucket"
# Databases refuse these characters.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
# Buckets are the first characters of a time, as text: SQLite keeps times so.
_SQLITE_LENGTHS = {TimeBucket.HOUR: len("2026-11-01 13"), TimeBucket.DAY: len("2026-11-01")}
_POSTGRESQL_FORMATS = {TimeBucket.HOUR: "YYYY-MM-DD HH24", TimeBucket.DAY: "YYYY-MM-DD"}


@dataclass(frozen=True, kw_only=True)
class UsageSums:
    """A page of rows, and the totals of all pages."""

    rows: Sequence[UsageRow]
    next_page_token: str
    totals: UsageTotals


class UsageStore:
    """Reads the usage of the ledger."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def sum_usage(self, query: UsageQuery, page: PageRequest) -> UsageSums:
        """Returns rows ordered by time bucket, then by the dimensions in their own order.

        Raises:
            InvalidArgument: the page token is invalid.
            Unavailable: the database does not answer.
        """
        conditions = _conditions(query)
        keys = self._keys(query)
        rows = sa.select(*keys, *_SUMS).where(*conditions).group_by(*keys).order_by(*keys)
        if page.after:
            rows = rows.where(sa.tuple_(*keys) > sa.tuple_(*_key_of(page.after, len(keys))))
        async with snapshot(self._engine) as connection:
            found = (await connection.execute(rows.limit(page.limit))).all()
            totals = (await connection.execute(sa.select(*_SUMS).where(*conditions))).one()
        found_page = Page.of(found, page, key=lambda row: json.dumps(list(row[: len(keys)])))
        return UsageSums(
            rows=[_usage_row(row, query) for row in found_page.rows],
            next_page_token=found_page.next_page_token,
            totals=_usage_totals(totals),
        )

    def _keys(self, query: UsageQuery) -> list[sa.ColumnElement[Any]]:
        dimensions = [usage.c[dimension.value] for dimension in query.group_by]
        return [self._bucket(query.bucket), *dimensions] if query.bucket else [*dimensions]

    def _bucket(self, bucket: TimeBucket) -> sa.ColumnElement[str]:
        """Returns the text with which the times of a bucket start, in UTC."""
        text: sa.ColumnElement[str]
        if self._engine.dialect.name == "sqlite":
            text = sa.func.substr(
                sa.cast(usage.c.event_time, sa.Text), 1, _constant(str(_SQLITE_LENGTHS[bucket]))
            )
        else:
            in_utc = sa.func.timezone(_constant("'UTC'"), usage.c.event_time)
            text = sa.func.to_char(in_utc, _constant(f"'{_POSTGRESQL_FORMATS[bucket]}'"))
        return text.label(_BUCKET)


def _constant(text: str) -> sa.ColumnElement[Any]:
    """Returns a part of the SQL itself: as a parameter, it would differ from place to place."""
    return sa.literal_column(text)


_SUMS = (
    sa.func.count(usage.c.request_id.distinct()).label("request_count"),
    *(
        sa.func.coalesce(sa.func.sum(usage.c[f"{kind}_tokens"]), 0).label(f"{kind}_tokens")
        for kind in ("prompt", "completion", "cached", "reasoning")
    ),
    sa.func.coalesce(sa.func.sum(usage.c.cost_nano_usd // _SPLIT), 0).label("cost_high"),
    sa.func.coalesce(sa.func.sum(usage.c.cost_nano_usd % _SPLIT), 0).label("cost_low"),
)


def _conditions(query: UsageQuery) -> list[sa.ColumnElement[bool]]:
    conditions: list[sa.ColumnElement[bool]] = [
        usage.c[dimension.value] == value for dimension, value in query.conditions.items()
    ]
    if query.start_time is not None:
        conditions.append(usage.c.event_time >= query.start_time)
    if query.end_time is not None:
        conditions.append(usage.c.event_time < query.end_time)
    return conditions


def _key_of(after: str, length: int) -> list[str]:
    try:
        values = json.loads(after)
    except (ValueError, RecursionError) as error:
        raise invalid_page_token() from error
    if not isinstance(values, list) or len(values) != length or not all(map(_is_text, values)):
        raise invalid_page_token()
    return values


def _is_text(value: object) -> bool:
    return isinstance(value, str) and _NO_TEXT.search(value) is None


def _usage_row(row: sa.Row[Any], query: UsageQuery) -> UsageRow:
    fields = row._mapping  # noqa: SLF001  # public, whatever its name
    return UsageRow(
        bucket_start_time=(
            datetime.fromisoformat(fields[_BUCKET]).replace(tzinfo=UTC) if query.bucket else None
        ),
        group={Dimension(each): fields[each.value] for each in query.group_by},
        totals=_usage_totals(row),
    )


def _usage_totals(row: sa.Row[Any]) -> UsageTotals:
    return UsageTotals(
        request_count=row.request_count,
        prompt_tokens=int(row.prompt_tokens),
        completion_tokens=int(row.completion_tokens),
        cached_tokens=int(row.cached_tokens),
        reasoning_tokens=int(row.reasoning_tokens),
        cost_nano_usd=int(row.cost_high) * _SPLIT + int(row.cost_low),
    )
