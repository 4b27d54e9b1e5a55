"""Booking is exactly once, on both databases, whoever books and whatever comes twice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.exc import DataError
from sqlalchemy.ext.asyncio import AsyncEngine

from libs.clock import SystemClock
from libs.db import create_engine, migrate, snapshot
from libs.errors import InvalidArgument
from libs.rpc.paging import PageRequest
from services.cost.domain import (
    ADJUSTMENT,
    MAX_INT64,
    InvalidUsageError,
    Price,
    Usage,
    UsageFilter,
)
from services.cost.ledger import MAX_BATCH_EVENTS, Ledger
from services.cost.price_book import PriceBook
from services.cost.store import CostStore
from services.cost.tables import metadata, postings, usage
from tests.support.databases import DATABASES, empty_database, shared_postgres

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

START = datetime(2026, 11, 1, tzinfo=UTC)
CLOCK = SystemClock()
PRICE = Price(
    name="prices/smollm2-1",
    model="smollm2",
    input_nano_usd_per_million_tokens=1_000_000,
    cached_input_nano_usd_per_million_tokens=0,
    output_nano_usd_per_million_tokens=2_000_000,
    effective_time=None,
    create_time=START,
)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def postgres_url() -> AsyncIterator[str]:
    async with shared_postgres() as server_url:
        yield server_url


@pytest_asyncio.fixture(loop_scope="module", params=DATABASES)
async def url(request: pytest.FixtureRequest, postgres_url: str, tmp_path: Path) -> str:
    return await empty_database(request.param, folder=tmp_path, postgres_url=postgres_url)


@pytest_asyncio.fixture(loop_scope="module")
async def engine(url: str) -> AsyncIterator[AsyncEngine]:
    await migrate(url, "cost")
    made = create_engine(url)
    yield made
    await made.dispose()


@pytest_asyncio.fixture(loop_scope="module")
async def store(engine: AsyncEngine) -> CostStore:
    made = CostStore(engine)
    await made.insert_price(PRICE)
    return made


def ledger_on(store: CostStore) -> Ledger:
    return Ledger(store, PriceBook(store, CLOCK, poll_seconds=60), CLOCK)


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
            "completion_tokens": 1,
            "cached_tokens": 0,
            "price": PRICE.name,
            "cost_nano_usd": number + 2,
            "event_time": START + timedelta(seconds=number),
            **fields,
        }
    )


async def rows(engine: AsyncEngine, table: sa.Table) -> Sequence[Any]:
    async with snapshot(engine) as connection:
        return (await connection.execute(sa.select(table))).all()


async def test_the_tables_are_those_that_the_code_knows(engine: AsyncEngine) -> None:
    """The migrations lead to `tables.py`: same tables, columns and indices."""

    def differences(connection: sa.Connection) -> list[str]:
        found = sa.inspect(connection)
        return [
            table.name
            for table in metadata.sorted_tables
            if {column["name"] for column in found.get_columns(table.name)}
            != {column.name for column in table.columns}
            or {index["name"] for index in found.get_indexes(table.name)}
            != {index.name for index in table.indexes}
        ]

    async with engine.connect() as connection:
        assert await connection.run_sync(differences) == []


async def test_two_replicas_book_each_usage_once(
    url: str, engine: AsyncEngine, store: CostStore
) -> None:
    """Each event goes to both, twice, at the same time and in any order."""
    other_engine = create_engine(url)
    ledgers = [ledger_on(store), ledger_on(CostStore(other_engine))]
    work = [(ledger, used(n)) for n in range(1, 301) for ledger in ledgers for _ in range(2)]
    random.Random(1).shuffle(work)  # noqa: S311  # a shuffle that is the same every time
    await asyncio.gather(*(ledger.book(usage) for ledger, usage in work))
    await other_engine.dispose()

    assert len(await rows(engine, usage)) == 300
    lines = await rows(engine, postings)
    assert len(lines) == 600
    assert sum(line.cost_nano_usd for line in lines) == sum(n + 2 for n in range(1, 301))


async def test_a_backlog_is_booked_in_few_transactions(
    engine: AsyncEngine, store: CostStore
) -> None:
    """What piles up while one transaction runs shares the next, up to a limit."""
    ledger = ledger_on(store)
    await asyncio.gather(*(ledger.book(used(n)) for n in range(2 * MAX_BATCH_EVENTS)))
    booked = await rows(engine, usage)
    assert len(booked) == 2 * MAX_BATCH_EVENTS
    assert len({row.book_time for row in booked}) <= 3


async def test_a_caller_that_goes_away_holds_up_nobody(
    engine: AsyncEngine, store: CostStore
) -> None:
    """The one that books for the others is cancelled in the middle; the next one goes on."""
    ledger = ledger_on(store)
    calls = [asyncio.create_task(ledger.book(used(n))) for n in range(20)]
    await asyncio.sleep(0.002)
    calls[0].cancel()
    async with asyncio.timeout(10):
        await asyncio.gather(*calls[1:])
    assert len(await rows(engine, usage)) >= 19


async def test_what_the_database_refuses_does_not_hold_up_its_neighbours(
    engine: AsyncEngine, store: CostStore
) -> None:
    """A number that no column holds fails alone, though it shared a transaction."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite's columns take every number that gets so far")
    ledger = ledger_on(store)
    bad = used(0, user="nul\x00")
    results = await asyncio.gather(
        *(ledger.book(usage) for usage in (used(1), bad, used(2), used(3))), return_exceptions=True
    )
    assert [type(result) for result in results] == [type(None), DataError, type(None), type(None)]
    assert len(await rows(engine, usage)) == 3


async def test_nonsense_never_reaches_the_database(engine: AsyncEngine, store: CostStore) -> None:
    """It is refused before it joins a batch."""
    with pytest.raises(InvalidUsageError):
        await ledger_on(store).book(used(1, tenant=""))
    assert await rows(engine, usage) == []


@pytest.mark.parametrize("price", ["", "prices/unknown"])
async def test_a_price_that_nobody_knows_costs_what_the_client_was_told(
    store: CostStore, price: str
) -> None:
    """Without a price all is free; where money was asked for all the same, it is an adjustment."""
    await ledger_on(store).book(used(10, price=price, cost_nano_usd=7))
    booked = await store.request_cost("acme", "request-00010")
    assert booked is not None
    assert [(line.kind, line.price, line.cost_nano_usd) for line in booked.postings] == [
        ("input", price, 0),
        ("output", price, 0),
        (ADJUSTMENT, "", 7),
    ]


async def test_a_price_of_another_replica_is_found_when_it_is_needed(store: CostStore) -> None:
    """The hot path may know a price before this replica has looked."""
    book = PriceBook(store, CLOCK, poll_seconds=60)
    await book.refresh()
    await store.insert_price(replace(PRICE, name="prices/new", input_nano_usd_per_million_tokens=0))
    await Ledger(store, book, CLOCK).book(used(5, price="prices/new", cost_nano_usd=2))
    booked = await store.request_cost("acme", "request-00005")
    assert booked is not None
    assert [line.kind for line in booked.postings] == ["input", "output"]


async def test_a_request_may_use_tokens_more_than_once(store: CostStore) -> None:
    """Its cost is the sum, oldest usage first; a usage of no tokens has no lines."""
    ledger = ledger_on(store)
    await ledger.book(used(2, request_id="r"))
    await ledger.book(used(1, request_id="r"))
    await ledger.book(
        used(3, request_id="r", prompt_tokens=0, completion_tokens=0, cost_nano_usd=0)
    )
    booked = await store.request_cost("acme", "r")
    assert booked is not None
    assert [line.usage_id for line in booked.postings] == ["usage-00001"] * 2 + ["usage-00002"] * 2
    assert sum(line.cost_nano_usd for line in booked.postings) == 7
    assert await store.request_cost("other", "r") is None
    (row,) = await store.sum_usage(UsageFilter(tenant="acme"), limit=10)
    assert (row.request_count, row.cost_nano_usd) == (1, 7)


async def test_sums_are_filtered_grouped_and_ordered(store: CostStore) -> None:
    """By user, model and time; the start is in, the end is out."""
    ledger = ledger_on(store)
    for number, (user, model) in enumerate(
        [("ben", "smollm2"), ("ann", "smollm2"), ("ann", "minilm"), ("ann", "smollm2")]
    ):
        await ledger.book(used(number, user=user, model=model))
    await ledger.book(used(9, tenant="other"))

    def of(**fields: Any) -> UsageFilter:
        return UsageFilter(tenant="acme", **fields)

    async def keys(wanted: UsageFilter) -> list[tuple[str, str, int, int]]:
        found = await store.sum_usage(wanted, limit=10)
        return [(row.user, row.model, row.request_count, row.prompt_tokens) for row in found]

    everything = [("ann", "minilm", 1, 2), ("ann", "smollm2", 2, 4), ("ben", "smollm2", 1, 0)]
    assert await keys(of()) == everything
    assert await keys(of(user="ben")) == everything[2:]
    assert await keys(of(user="ann", model="smollm2")) == everything[1:2]
    second = START + timedelta(seconds=1)
    third = START + timedelta(seconds=2)
    assert await keys(of(start_time=second, end_time=third)) == [("ann", "smollm2", 1, 1)]
    assert await keys(UsageFilter(tenant="nobody")) == []
    assert len(await store.sum_usage(of(), limit=2)) == 2


async def test_sums_beyond_64_bits_are_exact(store: CostStore) -> None:
    """The database's own sum would overflow; ours is split, and the caller decides."""
    ledger = ledger_on(store)
    for number in range(3):
        await ledger.book(used(number, cost_nano_usd=MAX_INT64 - number))
    (row,) = await store.sum_usage(UsageFilter(tenant="acme"), limit=10)
    assert row.cost_nano_usd == 3 * MAX_INT64 - 3


async def test_prices_are_listed_newest_first_in_pages(store: CostStore) -> None:
    """By the time from which they hold, then by name; every price once."""
    for number in range(7):
        await store.insert_price(
            replace(
                PRICE,
                name=f"prices/p{number}",
                model=("smollm2", "minilm")[number % 2],
                effective_time=START + timedelta(days=number // 2),
            )
        )
    everything = sorted(await store.all_prices(), key=lambda price: price.age_key, reverse=True)
    token = ""
    listed: list[Price] = []
    while True:
        page = await store.list_prices("", PageRequest.parse(3, token))
        listed += page.rows
        if not (token := page.next_page_token):
            break
    assert listed == everything
    of_model = await store.list_prices("minilm", PageRequest.parse(0, ""))
    assert list(of_model.rows) == [price for price in everything if price.model == "minilm"]


@pytest.mark.parametrize(
    "after", ["nothing", "2026-11-01 prices/a", "2026-11-01T00:00:00 prices/a"]
)
async def test_a_page_token_of_somebody_else_is_refused(store: CostStore, after: str) -> None:
    """One that decodes and is none of ours."""
    with pytest.raises(InvalidArgument):
        await store.list_prices("", PageRequest(3, after))
