"""Sums of usage, on both databases: groups, time buckets, filters and pages."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from libs.clock import SystemClock
from libs.db import create_engine, migrate
from libs.errors import InvalidArgument
from libs.metering.pricing import MAX_INT64
from libs.rpc.paging import PageRequest
from services.cost.domain import Usage, postings_of
from services.cost.store import CostStore
from services.cost.usage_query import Dimension, TimeBucket, UsageQuery, UsageRow, UsageTotals
from services.cost.usage_store import UsageStore, UsageSums
from tests.support.databases import DATABASES, empty_database, shared_postgres

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

START = datetime(2026, 11, 1, 22, 30, tzinfo=UTC)
ACME = {Dimension.TENANT: "acme"}
TENANT, USER, MODEL = Dimension.TENANT, Dimension.USER, Dimension.MODEL


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def postgres_url() -> AsyncIterator[str]:
    async with shared_postgres() as server_url:
        yield server_url


@pytest_asyncio.fixture(loop_scope="module", params=DATABASES)
async def engine(
    request: pytest.FixtureRequest, postgres_url: str, tmp_path: Path
) -> AsyncIterator[AsyncEngine]:
    url = await empty_database(request.param, folder=tmp_path, postgres_url=postgres_url)
    await migrate(url, "cost")
    made = create_engine(url)
    yield made
    await made.dispose()


def used(number: int, **fields: Any) -> Usage:
    return Usage(
        **{
            "usage_id": f"usage-{number:05}",
            "request_id": f"request-{number:05}",
            "tenant": "acme",
            "user": "ann",
            "model": "smollm2",
            "model_version": "models/smollm2/versions/1.0.0",
            "operation": "generate",
            "prompt_tokens": number,
            "completion_tokens": 2,
            "cached_tokens": 0,
            "reasoning_tokens": 1,
            "price": "",
            "cost_nano_usd": 10 * number,
            "event_time": START + timedelta(hours=number),
            **fields,
        }
    )


async def book(engine: AsyncEngine, *usages: Usage) -> None:
    bookings = [(usage, postings_of(usage, None)) for usage in usages]
    await CostStore(engine).book(bookings, SystemClock().now())


async def use_time_zone(engine: AsyncEngine, zone: str) -> None:
    """Sets the time zone of later connections; SQLite has none."""
    if engine.dialect.name == "sqlite":
        return
    async with engine.begin() as connection:
        name = (await connection.execute(sa.text("SELECT current_database()"))).scalar()
        await connection.execute(sa.text(f"ALTER DATABASE {name} SET timezone TO '{zone}'"))
    await engine.dispose()


async def sums(
    engine: AsyncEngine, *, size: int = 100, token: str = "", **fields: Any
) -> UsageSums:
    query = UsageQuery(**{"conditions": ACME, **fields})
    return await UsageStore(engine).sum_usage(query, PageRequest.parse(size, token))


async def groups(engine: AsyncEngine, **fields: Any) -> list[tuple[Any, ...]]:
    """Returns the values of each row, and the prompt tokens as a trace of what is in it."""
    found = await sums(engine, **fields)
    return [(*row.group.values(), row.totals.prompt_tokens) for row in found.rows]


async def test_sums_have_all_kinds_of_tokens(engine: AsyncEngine) -> None:
    """A request that used tokens twice counts once; its tokens and costs add up."""
    await book(engine, used(5, request_id="r"), used(7, request_id="r", cached_tokens=3))
    expected = UsageTotals(
        request_count=1,
        prompt_tokens=12,
        completion_tokens=4,
        cached_tokens=3,
        reasoning_tokens=2,
        cost_nano_usd=120,
    )
    group = {TENANT: "acme", USER: "ann", MODEL: "smollm2"}
    assert await sums(engine) == UsageSums(
        rows=[UsageRow(group=group, totals=expected)], next_page_token="", totals=expected
    )


async def test_no_usage_sums_up_to_nothing(engine: AsyncEngine) -> None:
    """No rows, and totals of zero."""
    found = await sums(engine)
    assert (found.rows, found.totals) == ([], UsageTotals(**dict.fromkeys(vars(found.totals), 0)))


async def test_sums_are_filtered_grouped_and_ordered(engine: AsyncEngine) -> None:
    """By every dimension and by time; the start is in, the end is out."""
    await book(
        engine,
        used(1, user="ben"),
        used(2),
        used(4, model="minilm", operation="embed"),
        used(8, model_version="models/smollm2/versions/2.0.0"),
        used(16, tenant="other"),
    )

    async def having(**conditions: str) -> list[tuple[Any, ...]]:
        chosen = {Dimension(name): value for name, value in conditions.items()}
        return await groups(engine, conditions={**ACME, **chosen}, group_by=())

    assert await groups(engine, group_by=(USER, MODEL)) == [
        ("ann", "minilm", 4),
        ("ann", "smollm2", 10),
        ("ben", "smollm2", 1),
    ]
    assert await groups(engine, group_by=(USER,)) == [("ann", 14), ("ben", 1)]
    assert await groups(engine, group_by=(Dimension.OPERATION,)) == [("embed", 4), ("generate", 11)]
    assert await groups(engine, conditions={}, group_by=(TENANT,)) == [("acme", 15), ("other", 16)]
    assert await having(user="ben") == [(1,)]
    assert await having(user="ann", model="smollm2") == [(10,)]
    assert await having(model_version="models/smollm2/versions/2.0.0") == [(8,)]
    assert await having(operation="embed") == [(4,)]
    times: dict[str, Any] = {
        "start_time": START + timedelta(hours=2),
        "end_time": START + timedelta(hours=4),
    }
    assert await groups(engine, group_by=(MODEL,), **times) == [("smollm2", 2)]
    assert (await sums(engine, **times)).totals.request_count == 1


@pytest.mark.parametrize(
    ("bucket", "expected"),
    [
        (TimeBucket.HOUR, [("2026-11-01T22", 1), ("2026-11-01T23", 4), ("2026-11-02T00", 2)]),
        (TimeBucket.DAY, [("2026-11-01T00", 5), ("2026-11-02T00", 2)]),
    ],
)
async def test_time_buckets_start_at_full_hours_and_days_in_utc(
    engine: AsyncEngine, bucket: TimeBucket, expected: list[tuple[str, int]]
) -> None:
    """Whatever the time zone of the database; rows of one bucket are together."""
    await use_time_zone(engine, "Asia/Kolkata")
    late = START + timedelta(minutes=29, seconds=59, microseconds=999_999)
    await book(
        engine,
        used(1, event_time=late),
        used(2, event_time=START + timedelta(minutes=90)),
        used(4, event_time=START + timedelta(minutes=30), user="zoe"),
    )
    found = await sums(engine, bucket=bucket, group_by=())
    assert [(row.bucket_start_time, row.totals.prompt_tokens) for row in found.rows] == [
        (datetime.fromisoformat(f"{start}:00+00:00"), tokens) for start, tokens in expected
    ]
    ordered = await sums(engine, bucket=bucket, group_by=(USER,))
    keys = [(row.bucket_start_time, row.group[USER]) for row in ordered.rows]
    assert keys == sorted(keys)


@pytest.mark.parametrize("bucket", [None, TimeBucket.HOUR, TimeBucket.DAY])
async def test_pages_have_each_row_once_and_the_totals_of_all(
    engine: AsyncEngine, bucket: TimeBucket | None
) -> None:
    """In the same order as one page with all; values may have any characters."""
    users = ["ann", "Ann", "ben", 'q"\\', "ü€", "", "~"]
    await book(
        engine,
        *(used(n, user=user, model=f"m{n % 3}") for n, user in enumerate(users * 3)),
    )
    everything = await sums(engine, bucket=bucket, group_by=(USER, MODEL))
    rows: list[UsageRow] = []
    token = ""
    while True:
        found = await sums(engine, bucket=bucket, group_by=(USER, MODEL), size=4, token=token)
        assert len(found.rows) <= 4
        assert found.totals == everything.totals
        rows += found.rows
        if not (token := found.next_page_token):
            break
    assert rows == everything.rows
    assert everything.totals.cost_nano_usd == 10 * sum(range(len(users) * 3))


@pytest.mark.parametrize(
    "after",
    ["nothing", "{}", "7", '["a"]', '["a", "b", "c"]', '["a", 1]', '["\\u0000", "b"]',
     '["\\ud800", "b"]', "[" * 100_000],
)  # fmt: skip
async def test_a_page_token_of_another_query_is_refused(engine: AsyncEngine, after: str) -> None:
    """One that can be decoded and holds no key of this query."""
    query = UsageQuery(conditions=ACME, group_by=(USER, MODEL))
    with pytest.raises(InvalidArgument) as caught:
        await UsageStore(engine).sum_usage(query, PageRequest(3, after))
    assert [field for field, _ in caught.value.field_violations] == ["page_token"]


async def test_sums_beyond_64_bits_are_exact(engine: AsyncEngine) -> None:
    """A database's own sum would overflow; this one is split, and the caller decides."""
    await book(engine, *(used(number, cost_nano_usd=MAX_INT64 - number) for number in range(3)))
    found = await sums(engine)
    assert found.totals.cost_nano_usd == found.rows[0].totals.cost_nano_usd == 3 * MAX_INT64 - 3
