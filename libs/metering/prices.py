"""The price book of a process: pushed by `cost`, looked up in memory by each request."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import NamedTuple, TypeAlias

from headrace.common.v1 import usage_pb2
from headrace.cost.v1 import cost_pb2

from libs.metering.pricing import MAX_PER_QUANTITY, Rate, Rates, UsageKind
from libs.rpc.names import tenant_id

USAGE_KINDS: Mapping[int, UsageKind] = {
    usage_pb2.UsageKind.Value(f"USAGE_KIND_{kind.name}"): kind for kind in UsageKind
}


class EffectivePrice(NamedTuple):
    """A price as requests apply it.

    Attributes:
        name: `prices/{price}`.
        effective_time: when it takes effect.
        rates: by kind of usage.
    """

    name: str
    effective_time: datetime
    rates: Rates


_Newest: TypeAlias = list[EffectivePrice]


class PriceBook:
    """All prices that apply now or later. A new book replaces it when prices change."""

    def __init__(self, prices: Iterable[cost_pb2.Price] = ()) -> None:
        general: dict[str, _Newest] = defaultdict(list)
        own: dict[tuple[str, str], _Newest] = defaultdict(list)
        for price in prices:
            if price.tenant:
                own[price.model, tenant_id(price.tenant)].append(_effective_price(price))
            else:
                general[price.model].append(_effective_price(price))
        for of_one in (*general.values(), *own.values()):
            of_one.sort(key=lambda price: (price.effective_time, price.name), reverse=True)
        self._general: Mapping[str, _Newest] = dict(general)
        self._own: Mapping[tuple[str, str], _Newest] = dict(own)

    def price_of(self, model: str, now: datetime, *, tenant: str = "") -> EffectivePrice | None:
        """Returns the price in effect, or None if the model has none.

        Args:
            model: its public name.
            now: the time.
            tenant: who pays, without `tenants/`. A price of its own goes before the general one.
        """
        for price in self._own.get((model, tenant), ()):
            if price.effective_time <= now:
                return price
        for price in self._general.get(model, ()):
            if price.effective_time <= now:
                return price
        return None


def rates_of(price: cost_pb2.Price) -> Rates:
    """Returns the rates of a price by kind, without kinds that this version does not count."""
    return {
        USAGE_KINDS[rate.kind]: Rate(rate.nano_usd, rate.per_quantity or MAX_PER_QUANTITY)
        for rate in price.rates
        if rate.kind in USAGE_KINDS
    }


def _effective_price(price: cost_pb2.Price) -> EffectivePrice:
    stamp = price.effective_time if price.HasField("effective_time") else price.create_time
    return EffectivePrice(price.name, stamp.ToDatetime(tzinfo=UTC), rates_of(price))
