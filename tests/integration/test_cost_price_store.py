"""Prices in both databases."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy.ext.asyncio import AsyncEngine

from libs.db import create_engine, migrate
from libs.errors import InvalidArgument
from libs.metering.pricing import Rate, UsageKind
from libs.rpc.paging import PageRequest
from services.cost.domain import Price
from services.cost.store import CostStore, PriceFilter
from tests.support.databases import DATABASES, empty_database, shared_postgres

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

START = datetime(2026, 11, 1, tzinfo=UTC)
PRICE = Price(
    name="prices/p",
    model="smollm2",
    tenant="",
    rates={
        UsageKind.PROMPT_TOKENS: Rate(1_000_000, 1_000_000),
        UsageKind.CACHED_PROMPT_TOKENS: Rate(3, 7),
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
async def engine(
    request: pytest.FixtureRequest, postgres_url: str, tmp_path: Path
) -> AsyncIterator[AsyncEngine]:
    url = await empty_database(request.param, folder=tmp_path, postgres_url=postgres_url)
    await migrate(url, "cost")
    made = create_engine(url)
    yield made
    await made.dispose()


@pytest_asyncio.fixture(loop_scope="module")
async def store(engine: AsyncEngine) -> CostStore:
    return CostStore(engine)


async def all_pages(store: CostStore, wanted: PriceFilter, *, size: int) -> list[Price]:
    token = ""
    listed: list[Price] = []
    while True:
        page = await store.list_prices(wanted, PageRequest.parse(size, token))
        assert len(page.rows) <= size
        listed += page.rows
        if not (token := page.next_page_token):
            return listed


async def test_a_price_never_changes(store: CostStore) -> None:
    """A second price with the name is not stored, and none of its rates."""
    assert await store.insert_price(PRICE) == PRICE
    other = replace(PRICE, rates={UsageKind.PROMPT_TOKENS: Rate(9, 9)}, tenant="acme")
    assert await store.insert_price(other) == PRICE
    assert await store.all_prices() == [PRICE]


async def test_prices_are_listed_newest_first_in_pages(store: CostStore) -> None:
    """By the time from which they apply, then by name; every price once, with all its rates."""
    for number in range(7):
        kinds = list(UsageKind)[: 1 + number % 3]
        await store.insert_price(
            replace(
                PRICE,
                name=f"prices/p{number}",
                model=("smollm2", "minilm")[number % 2],
                rates={kind: PRICE.rates[kind] for kind in kinds},
                effective_time=START + timedelta(days=number // 2),
            )
        )
    everything = sorted(await store.all_prices(), key=lambda price: price.age_key, reverse=True)
    assert await all_pages(store, PriceFilter(), size=3) == everything
    of_model = await all_pages(store, PriceFilter(model="minilm"), size=100)
    assert of_model == [price for price in everything if price.model == "minilm"]


async def test_prices_of_tenants_are_visible_to_them_only(store: CostStore) -> None:
    """General prices are visible to all; filters select among what is visible."""
    for name, tenant in (("general", ""), ("of-acme", "acme"), ("of-other", "other")):
        await store.insert_price(replace(PRICE, name=f"prices/{name}", tenant=tenant))

    async def names(**fields: str | None) -> set[str]:
        listed = await all_pages(store, PriceFilter(**fields), size=2)
        return {price.name.removeprefix("prices/") for price in listed}

    assert await names() == {"general", "of-acme", "of-other"}
    assert await names(tenant="other") == {"of-other"}
    assert await names(tenant="") == {"general"}
    assert await names(visible_to="acme") == {"general", "of-acme"}
    assert await names(visible_to="acme", tenant="acme") == {"of-acme"}
    assert await names(visible_to="acme", tenant="other") == set()


@pytest.mark.parametrize(
    "after", ["nothing", "2026-11-01 prices/a", "2026-11-01T00:00:00 prices/a"]
)
async def test_a_page_token_of_another_list_is_refused(store: CostStore, after: str) -> None:
    """One that can be decoded and holds no key of this list."""
    with pytest.raises(InvalidArgument) as caught:
        await store.list_prices(PriceFilter(), PageRequest(3, after))
    assert [field for field, _ in caught.value.field_violations] == ["page_token"]
