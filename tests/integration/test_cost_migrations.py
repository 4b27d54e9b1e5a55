"""Databases of earlier versions keep everything when they are migrated."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import services.cost
from libs.db import create_engine, migrate, transaction
from libs.metering.pricing import Rate, UsageKind
from libs.rpc.paging import PageRequest
from services.cost.domain import PostingKind, Price
from services.cost.store import CostStore, PriceFilter
from services.cost.usage_query import UsageQuery
from services.cost.usage_store import UsageStore
from tests.support.databases import DATABASES, empty_database, shared_postgres

pytestmark = pytest.mark.integration

MIGRATIONS = Path(services.cost.__file__).parent / "migrations"
START = datetime(2026, 11, 1, tzinfo=UTC)
RATES = ("input", "cached_input", "output")


@pytest.fixture(params=DATABASES)
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    async with shared_postgres() as postgres_url:
        yield await empty_database(request.param, folder=tmp_path, postgres_url=postgres_url)


@pytest.fixture
def first_migration(tmp_path: Path) -> Path:
    folder = tmp_path / "migrations"
    folder.mkdir()
    shutil.copy(MIGRATIONS / "0001_prices_and_ledger.py", folder)
    return folder


async def insert(url: str, table: str, **values: Any) -> None:
    """Inserts a row; its text is written as the first version wrote it."""
    names = ", ".join(f'"{name}"' for name in values)
    places = ", ".join(f":{name}" for name in values)
    engine = create_engine(url)
    async with transaction(engine) as connection:
        statement = sa.text(f"INSERT INTO {table} ({names}) VALUES ({places})")  # noqa: S608  # a test
        await connection.execute(statement, values)
    await engine.dispose()


async def first_version(url: str, folder: Path) -> None:
    """Makes a database with the first migration, and fills it."""
    await migrate(url, "cost", folder=folder)

    def moment(value: datetime) -> Any:
        return value.strftime("%Y-%m-%d %H:%M:%S.%f") if url.startswith("sqlite") else value

    for name, amounts, effective in (
        ("prices/a", (100, 25, 400), None),
        ("prices/b", (7, 0, 10**15), START + timedelta(days=1)),
    ):
        per_million = {
            f"{rate}_nano_usd_per_million_tokens": amount
            for rate, amount in zip(RATES, amounts, strict=True)
        }
        await insert(
            url,
            "prices",
            name=name,
            model="smollm2",
            effective_time=effective and moment(effective),
            create_time=moment(START),
            **per_million,
        )
    await insert(
        url,
        "usage",
        usage_id="u",
        request_id="r",
        tenant="acme",
        user="ann",
        model="smollm2",
        model_version="models/smollm2/versions/1.0.0",
        operation="generate",
        prompt_tokens=12,
        completion_tokens=3,
        cached_tokens=2,
        price="prices/a",
        cost_nano_usd=9,
        event_time=moment(START),
        book_time=moment(START),
    )
    lines = [("input", 10, 100, 1), ("cached_input", 2, 25, 0), ("output", 3, 400, 5)]
    for position, (kind, quantity, rate, cost) in enumerate([*lines, ("adjustment", 0, 0, 3)]):
        await insert(
            url,
            "postings",
            usage_id="u",
            position=position,
            kind=kind,
            quantity_tokens=quantity,
            price="prices/a" if quantity else "",
            nano_usd_per_million_tokens=rate,
            cost_nano_usd=cost,
        )


async def test_the_first_version_is_migrated_without_loss(url: str, first_migration: Path) -> None:
    """Old columns of prices become rates; postings keep their amounts and say what they charge."""
    await first_version(url, first_migration)
    await migrate(url, "cost")
    engine = create_engine(url)
    store = CostStore(engine)

    listed = await store.list_prices(PriceFilter(), PageRequest.parse(0, ""))
    assert list(listed.rows) == [
        Price(
            name=name,
            model="smollm2",
            tenant="",
            rates={
                kind: Rate(amount, 1_000_000)
                for kind, amount in zip(UsageKind, amounts, strict=True)
            },
            effective_time=effective,
            create_time=START,
        )
        for name, amounts, effective in (
            ("prices/b", (7, 0, 10**15), START + timedelta(days=1)),
            ("prices/a", (100, 25, 400), None),
        )
    ]

    cost = await store.request_cost("acme", "r")
    assert cost is not None
    assert [
        (
            line.kind,
            line.usage_kind,
            line.quantity,
            line.price,
            Rate(line.rate_nano_usd, line.rate_per_quantity),
            line.cost_nano_usd,
        )
        for line in cost.postings
    ] == [
        (PostingKind.CHARGE, UsageKind.PROMPT_TOKENS, 10, "prices/a", Rate(100, 1_000_000), 1),
        (PostingKind.CHARGE, UsageKind.CACHED_PROMPT_TOKENS, 2, "prices/a", Rate(25, 1_000_000), 0),
        (PostingKind.CHARGE, UsageKind.COMPLETION_TOKENS, 3, "prices/a", Rate(400, 1_000_000), 5),
        (PostingKind.ADJUSTMENT, None, 0, "", Rate(0, 0), 3),
    ]
    sums = await UsageStore(engine).sum_usage(UsageQuery(conditions={}), PageRequest.parse(0, ""))
    assert (sums.totals.cost_nano_usd, sums.totals.reasoning_tokens) == (9, 0)
    await engine.dispose()
