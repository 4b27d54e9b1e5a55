"""Each usage is booked once on both databases, also by several processes and after duplicates."""

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
from libs.metering.pricing import Rate, UsageKind
from services.cost.domain import InvalidUsageError, PostingKind, Price, Usage
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
    tenant="",
    rates={
        UsageKind.PROMPT_TOKENS: Rate(1_000_000, 1_000_000),
        UsageKind.COMPLETION_TOKENS: Rate(2, 1),
    },
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
            "reasoning_tokens": 0,
            "price": PRICE.name,
            "cost_nano_usd": number + 2,
            "event_time": START + timedelta(seconds=number),
            **fields,
        }
    )


async def rows(engine: AsyncEngine, table: sa.Table) -> Sequence[Any]:
    async with snapshot(engine) as connection:
        return (await connection.execute(sa.select(table))).all()


async def test_the_tables_are_those_in_the_code(engine: AsyncEngine) -> None:
    """The migrations give the tables, columns and indices of `tables.py`."""

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
    """Each event reaches both, twice, at the same time and in any order."""
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
    """Usage that comes while one transaction runs shares the next, up to a limit."""
    ledger = ledger_on(store)
    await asyncio.gather(*(ledger.book(used(n)) for n in range(2 * MAX_BATCH_EVENTS)))
    booked = await rows(engine, usage)
    assert len(booked) == 2 * MAX_BATCH_EVENTS
    assert len({row.book_time for row in booked}) <= 3


async def test_a_cancelled_caller_delays_no_other(engine: AsyncEngine, store: CostStore) -> None:
    """The one that books for the others is cancelled while it books; the next one continues."""
    ledger = ledger_on(store)
    calls = [asyncio.create_task(ledger.book(used(n))) for n in range(20)]
    await asyncio.sleep(0.002)
    calls[0].cancel()
    async with asyncio.timeout(10):
        await asyncio.gather(*calls[1:])
    assert len(await rows(engine, usage)) >= 19


async def test_usage_that_the_database_refuses_fails_alone(
    engine: AsyncEngine, store: CostStore
) -> None:
    """The usage that shared its transaction is booked."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite accepts every text")
    ledger = ledger_on(store)
    bad = used(0, user="nul\x00")
    results = await asyncio.gather(
        *(ledger.book(usage) for usage in (used(1), bad, used(2), used(3))), return_exceptions=True
    )
    assert [type(result) for result in results] == [type(None), DataError, type(None), type(None)]
    assert len(await rows(engine, usage)) == 3


async def test_impossible_usage_is_never_written(engine: AsyncEngine, store: CostStore) -> None:
    """It is refused before it joins a batch."""
    with pytest.raises(InvalidUsageError):
        await ledger_on(store).book(used(1, tenant=""))
    assert await rows(engine, usage) == []


@pytest.mark.parametrize("price", ["", "prices/unknown"])
async def test_an_unknown_price_costs_what_was_reported(store: CostStore, price: str) -> None:
    """Without a price all is free; a cost that was reported all the same is an adjustment."""
    await ledger_on(store).book(used(10, price=price, cost_nano_usd=7))
    booked = await store.request_cost("acme", "request-00010")
    assert booked is not None
    assert [
        (line.kind, line.usage_kind, line.price, line.cost_nano_usd) for line in booked.postings
    ] == [
        (PostingKind.CHARGE, UsageKind.PROMPT_TOKENS, price, 0),
        (PostingKind.CHARGE, UsageKind.COMPLETION_TOKENS, price, 0),
        (PostingKind.ADJUSTMENT, None, "", 7),
    ]


async def test_a_price_of_another_replica_is_found_when_it_is_needed(store: CostStore) -> None:
    """A process may apply a price before this replica has read it."""
    book = PriceBook(store, CLOCK, poll_seconds=60)
    await book.refresh()
    rates = {UsageKind.COMPLETION_TOKENS: Rate(2, 1)}
    await store.insert_price(replace(PRICE, name="prices/new", rates=rates))
    await Ledger(store, book, CLOCK).book(used(5, price="prices/new", cost_nano_usd=2))
    booked = await store.request_cost("acme", "request-00005")
    assert booked is not None
    assert [line.cost_nano_usd for line in booked.postings] == [0, 2]
    assert all(line.kind is PostingKind.CHARGE for line in booked.postings)


async def test_a_request_may_use_tokens_more_than_once(store: CostStore) -> None:
    """Its cost is the sum, the oldest usage first; a usage of no tokens has no postings."""
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
