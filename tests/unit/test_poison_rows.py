"""A row that cannot be read stops neither the registry's feed nor the price book."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any, cast

from prometheus_client import REGISTRY

from services.cost.domain import Price
from services.cost.price_book import PriceBook
from services.registry import feed as feed_module
from services.registry.domain import Snapshot
from services.registry.feed import DeploymentFeed


def counted(name: str) -> float:
    return REGISTRY.get_sample_value(name) or 0.0


class Deployments:
    """A store whose second revision cannot be parsed."""

    def __init__(self) -> None:
        self.current = 1

    async def revision(self) -> int:
        return self.current

    async def deployments_snapshot(self) -> Snapshot:
        if self.current == 2:
            raise ValueError("a poison row")
        return Snapshot(revision=self.current, deployments=())


async def test_the_feed_skips_a_row_that_cannot_be_parsed(monkeypatch):
    """Watchers keep the snapshot before it and get the one after it."""
    monkeypatch.setattr(feed_module, "POLL_SECONDS", 0.01)
    failures = counted("headrace_registry_feed_failures_total")
    store = Deployments()
    feed = DeploymentFeed(cast(Any, store))
    running = asyncio.create_task(feed.run())
    async with asyncio.timeout(10):
        while feed._latest.value is None:  # noqa: ASYNC110  # no event
            await asyncio.sleep(0.01)
        store.current = 2
        while counted("headrace_registry_feed_failures_total") < failures + 2:  # noqa: ASYNC110  # no event
            await asyncio.sleep(0.01)
        assert feed._latest.value.revision == 1
        assert (await anext(feed.watch("pool"))).revision == 1
        store.current = 3
        while feed._latest.value.revision != 3:  # noqa: ASYNC110  # no event
            await asyncio.sleep(0.01)
    assert not running.done()
    running.cancel()


class Prices:
    poison = True

    async def all_prices(self) -> list[Price]:
        if self.poison:
            raise ValueError("a poison row")
        return []


class Clock:
    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0.01)


async def test_the_price_book_skips_a_row_that_cannot_be_parsed():
    """It is pushed as soon as it can be read again."""
    failures = counted("headrace_cost_price_book_failures_total")
    store = Prices()
    book = PriceBook(cast(Any, store), cast(Any, Clock()), poll_seconds=1)
    running = asyncio.create_task(book.poll())
    async with asyncio.timeout(10):
        while counted("headrace_cost_price_book_failures_total") < failures + 2:  # noqa: ASYNC110  # no event
            await asyncio.sleep(0.01)
        store.poison = False
        assert await anext(book.watch()) == []
    assert not running.done()
    running.cancel()
