"""The price book in hand: `cost` pushes it, requests look up in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from headrace.cost.v1 import cost_pb2


class PriceBook:
    """All prices, by model. Replaced as a whole when a new one is pushed."""

    def __init__(self, prices: Iterable[cost_pb2.Price] = ()) -> None:
        by_model: dict[str, list[tuple[datetime, cost_pb2.Price]]] = defaultdict(list)
        for price in prices:
            by_model[price.model].append((_effective(price), price))
        for dated in by_model.values():
            dated.sort(key=lambda entry: (entry[0], entry[1].name), reverse=True)
        self._by_model: Mapping[str, list[tuple[datetime, cost_pb2.Price]]] = dict(by_model)

    def price_of(self, model: str, now: datetime) -> cost_pb2.Price | None:
        """Returns the price of a model, by its public name, that holds now; None if it has none."""
        for effective_time, price in self._by_model.get(model, ()):
            if effective_time <= now:
                return price
        return None


def _effective(price: cost_pb2.Price) -> datetime:
    stamp = price.effective_time if price.HasField("effective_time") else price.create_time
    return stamp.ToDatetime(tzinfo=UTC)
