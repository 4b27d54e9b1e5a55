"""Prices that are pushed are enough to price every later request."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from headrace.common.v1 import usage_pb2
from headrace.cost.v1 import cost_pb2
from hypothesis import given
from hypothesis import strategies as st

from libs.errors import InvalidArgument
from libs.metering.prices import PriceBook
from libs.metering.pricing import MAX_NANO_USD_EACH, MAX_PER_QUANTITY, Rate, UsageKind
from services.cost.domain import Price, current_and_later
from services.cost.store import PriceFilter
from services.cost.wire import price_filter_from_proto, price_from_proto, price_to_proto

START = datetime(2026, 11, 1, tzinfo=UTC)
GOOD = Price(
    name="prices/one",
    model="smollm2",
    tenant="",
    rates={
        UsageKind.PROMPT_TOKENS: Rate(1, 1_000_000),
        UsageKind.CACHED_PROMPT_TOKENS: Rate(2, 1_000),
        UsageKind.COMPLETION_TOKENS: Rate(3, 1),
    },
    effective_time=START,
    create_time=START,
)
MODELS = ["smollm2", "minilm"]
TENANTS = ["", "acme"]

moments = st.integers(0, 20).map(lambda minutes: START + timedelta(minutes=minutes))


@st.composite
def books(draw) -> list[Price]:
    return [
        replace(
            GOOD,
            name=f"prices/p{number}",
            model=draw(st.sampled_from(MODELS)),
            tenant=draw(st.sampled_from(TENANTS)),
            effective_time=draw(st.none() | moments),
            create_time=draw(moments),
        )
        for number in range(draw(st.integers(0, 8)))
    ]


def book_of(prices: list[Price]) -> PriceBook:
    return PriceBook(price_to_proto(price) for price in prices)


def rate(kind: int = 1, **fields: Any) -> cost_pb2.Rate:
    return cost_pb2.Rate(kind=kind, **fields)  # type: ignore[arg-type]  # unknown ones, too


@given(books(), moments, moments)
def test_the_pushed_prices_decide_like_the_full_book(
    prices: list[Price], pushed_at: datetime, later: datetime
) -> None:
    """From the push on, a process finds the price that the full book has, for every tenant."""
    at = max(pushed_at, later)
    pushed = current_and_later(prices, pushed_at)
    for model in MODELS:
        for tenant in ["acme", "other"]:
            found = book_of(pushed).price_of(model, at, tenant=tenant)
            assert found == book_of(prices).price_of(model, at, tenant=tenant)


@given(books(), moments)
def test_what_is_pushed_is_small_and_newest_first(prices: list[Price], now: datetime) -> None:
    """For each model and tenant at most one price of the past."""
    pushed = current_and_later(prices, now)
    keys = [price.age_key for price in pushed]
    assert keys == sorted(keys, reverse=True)
    past = [(price.model, price.tenant) for price in pushed if price.effective_from <= now]
    assert len(past) == len(set(past))


@given(books())
def test_a_price_is_read_as_it_was_written(prices: list[Price]) -> None:
    """What is not set stays so."""
    for price in prices:
        assert price_from_proto(price_to_proto(price), create_time=price.create_time) == price


def test_a_rate_without_quantity_is_for_a_million() -> None:
    """It is stored and returned so."""
    message = price_to_proto(GOOD)
    del message.rates[:]
    message.rates.append(rate(nano_usd=5))
    price = price_from_proto(message, create_time=START)
    assert price.rates == {UsageKind.PROMPT_TOKENS: Rate(5, 1_000_000)}
    assert price_to_proto(price).rates[0].per_quantity == 1_000_000


def test_the_order_of_rates_does_not_matter() -> None:
    """The same rates in another order are the same price."""
    message = price_to_proto(GOOD)
    other = price_to_proto(GOOD)
    del other.rates[:]
    other.rates.extend(reversed(message.rates))
    first, second = (price_from_proto(each, create_time=START) for each in (message, other))
    assert first.same_content(second)
    assert price_to_proto(second) == message


@pytest.mark.parametrize(
    "name", ["prices/a", "prices/2026-11-smollm2", "prices/-", f"prices/{'a' * 63}"]
)
def test_names_in_the_form_of_the_contract_are_accepted(name: str) -> None:
    """`[a-z0-9-]`, at most 63 characters."""
    replace(GOOD, name=name).check()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "prices/"),
        ("name", "price/a"),
        ("name", "prices/A"),
        ("name", "prices/a/b"),
        ("name", f"prices/{'a' * 64}"),
        ("model", ""),
        ("model", "m" * 256),
        ("model", "m\0"),
        ("tenant", "-"),
        ("rates", {}),
    ],
)
def test_a_wrong_price_is_refused_by_field(field: str, value: Any) -> None:
    """The violation names the field in the request."""
    with pytest.raises(InvalidArgument) as caught:
        replace(GOOD, **{field: value}).check()
    assert [name for name, _ in caught.value.field_violations] == [f"price.{field}"]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (Rate(-1, 1_000_000), "nano_usd"),
        (Rate(MAX_NANO_USD_EACH + 1, 1), "nano_usd"),
        (Rate(MAX_NANO_USD_EACH * MAX_PER_QUANTITY + 1, MAX_PER_QUANTITY), "nano_usd"),
        (Rate(0, -1), "per_quantity"),
        (Rate(0, MAX_PER_QUANTITY + 1), "per_quantity"),
    ],
)
def test_a_wrong_rate_is_refused_by_field(wrong: Rate, field: str) -> None:
    """The violation names the rate by its position."""
    rates = {UsageKind.PROMPT_TOKENS: Rate(0, 1), UsageKind.COMPLETION_TOKENS: wrong}
    with pytest.raises(InvalidArgument) as caught:
        replace(GOOD, rates=rates).check()
    assert [name for name, _ in caught.value.field_violations] == [f"price.rates[1].{field}"]


def test_the_highest_rates_are_accepted() -> None:
    """A US dollar for each token, in any quantity."""
    for per in (1, 1_000, MAX_PER_QUANTITY):
        rates = dict.fromkeys(UsageKind, Rate(MAX_NANO_USD_EACH * per, per))
        replace(GOOD, rates=rates).check()


@pytest.mark.parametrize("kind", [0, 1, 99])
def test_a_kind_without_meaning_or_given_twice_is_refused(kind: int) -> None:
    """Unspecified, unknown, or with another rate already."""
    message = price_to_proto(GOOD)
    message.rates.append(rate(kind))
    with pytest.raises(InvalidArgument) as caught:
        price_from_proto(message, create_time=START)
    assert [name for name, _ in caught.value.field_violations] == ["price.rates[3].kind"]


def test_a_tenant_without_its_prefix_is_refused() -> None:
    """Names of tenants are `tenants/{tenant}`."""
    message = price_to_proto(GOOD)
    message.tenant = "acme"
    with pytest.raises(InvalidArgument) as caught:
        price_from_proto(message, create_time=START)
    assert [name for name, _ in caught.value.field_violations] == ["price.tenant"]


def test_an_effective_time_out_of_range_is_refused() -> None:
    """Timestamps after the year 9999 are invalid."""
    price = price_to_proto(GOOD)
    price.effective_time.seconds = 2**60
    with pytest.raises(InvalidArgument) as caught:
        price_from_proto(cost_pb2.Price.FromString(price.SerializeToString()), create_time=START)
    assert caught.value.field_violations[0][0] == "price.effective_time"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", PriceFilter(visible_to="acme")),
        ('model = "smollm2"', PriceFilter(model="smollm2", visible_to="acme")),
        (
            'tenant = "tenants/b" AND model = "m"',
            PriceFilter(model="m", tenant="b", visible_to="acme"),
        ),
        ('tenant = ""', PriceFilter(tenant="", visible_to="acme")),
    ],
)
def test_prices_are_filtered_by_model_and_tenant(text: str, expected: PriceFilter) -> None:
    """An empty tenant selects general prices."""
    assert price_filter_from_proto(text, visible_to="acme") == expected


@pytest.mark.parametrize("text", ['tenant = "acme"', 'name = "prices/a"', "model"])
def test_a_wrong_price_filter_is_refused(text: str) -> None:
    """Also a tenant without its prefix, which no price could match."""
    with pytest.raises(InvalidArgument) as caught:
        price_filter_from_proto(text, visible_to=None)
    assert [name for name, _ in caught.value.field_violations] == ["filter"]


def test_every_kind_has_the_name_of_the_contract() -> None:
    """What is stored can be written, and what is written can be stored."""
    message = price_to_proto(GOOD)
    assert [each.kind for each in message.rates] == [
        usage_pb2.USAGE_KIND_PROMPT_TOKENS,
        usage_pb2.USAGE_KIND_CACHED_PROMPT_TOKENS,
        usage_pb2.USAGE_KIND_COMPLETION_TOKENS,
    ]
