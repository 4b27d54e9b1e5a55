"""The price book in memory: read when usage is booked, and pushed to services that watch it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import structlog
from prometheus_client import Counter

from libs.clock import Clock
from libs.errors import Unavailable
from libs.rpc.latest import Latest
from services.cost.domain import Price, current_and_later
from services.cost.store import CostStore

_log = structlog.get_logger()

_READ_FAILURES = Counter(
    "headrace_cost_price_book_failures",
    "Reads of the price book that failed, other than because of an outage.",
)


class PriceBook:
    """All prices. Prices never change, so that one that was read stays valid."""

    def __init__(self, store: CostStore, clock: Clock, *, poll_seconds: float) -> None:
        self._store = store
        self._clock = clock
        self._poll_seconds = poll_seconds
        self._by_name: Mapping[str, Price] = {}
        self._latest = Latest[Mapping[str, Price]]()

    async def create(self, price: Price) -> Price:
        """Adds a price and pushes the book; returns the price with that name, old or new."""
        stored = await self._store.insert_price(price)
        if stored.name not in self._by_name:
            await self.refresh()
        return stored

    async def find(self, name: str) -> Price | None:
        """Returns the price with a name, or None if there is none."""
        if name and name not in self._by_name:
            await self.refresh()
        return self._by_name.get(name)

    async def refresh(self) -> None:
        """Reads the book, and pushes it if it has grown."""
        by_name = {price.name: price for price in await self._store.all_prices()}
        # The book only grows: of two reads that overlap, the older one may come last, with less.
        if by_name.keys() - self._by_name.keys() or self._latest.value is None:
            self._by_name = by_name
            self._latest.publish(by_name)

    async def poll(self) -> None:
        """Reads prices that other replicas created, at intervals, until it is cancelled."""
        while True:
            await self._clock.sleep(self._poll_seconds)
            try:
                await self.refresh()
            except Unavailable as error:
                _log.warning("cannot read the price book", error=error)
            except Exception:  # noqa: BLE001  # whatever it is, the next read may succeed
                # Such as a row that cannot be parsed: the last good book stays in force.
                _READ_FAILURES.inc()
                _log.exception("cannot read the price book")

    async def watch(self) -> AsyncIterator[list[Price]]:
        """Yields the prices that apply now or later: immediately, and after each change."""
        async for by_name in self._latest.follow():
            yield current_and_later(by_name.values(), self._clock.now())

    def close(self) -> None:
        """Ends all watches."""
        self._latest.close()
