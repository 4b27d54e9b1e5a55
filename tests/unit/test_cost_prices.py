"""Prices that are pushed are enough to price every request to come."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from headrace.cost.v1 import cost_pb2
from hypothesis import given
from hypothesis import strategies as st

from libs.errors import InvalidArgument
from libs.metering.prices import PriceBook
from services.cost.domain import (
    MAX_NANO_USD_PER_MILLION_TOKENS,
    Price,
    UsageFilter,
    current_and_later,
)
from services.cost.wire import price_from_proto, price_to_proto

START = datetime(2026, 11, 1, tzinfo=UTC)
GOOD = Price(
    name="prices/one",
    model="smollm2",
    input_nano_usd_per_million_tokens=1,
    cached_input_nano_usd_per_million_tokens=2,
    output_nano_usd_per_million_tokens=3,
    effective_time=START,
    create_time=START,
)

moments = st.integers(0, 20).map(lambda minutes: START + timedelta(minutes=minutes))


@st.composite
def books(draw) -> list[Price]:
    return [
        replace(
            GOOD,
            name=f"prices/p{number}",
            model=draw(st.sampled_from(["smollm2", "minilm"])),
            effective_time=draw(st.none() | moments),
            create_time=draw(moments),
        )
        for number in range(draw(st.integers(0, 8)))
    ]


def book_of(prices: list[Price]) -> PriceBook:
    return PriceBook(price_to_proto(price) for price in prices)


@given(books(), moments, moments)
def test_the_pushed_prices_decide_like_the_whole_book(
    prices: list[Price], pushed_at: datetime, later: datetime
) -> None:
    """From the push on, whoever holds it finds the price that the whole book has."""
    at = max(pushed_at, later)
    pushed = current_and_later(prices, pushed_at)
    for model in ("smollm2", "minilm"):
        assert book_of(pushed).price_of(model, at) == book_of(prices).price_of(model, at)


@given(books(), moments)
def test_what_is_pushed_is_small_and_newest_first(prices: list[Price], now: datetime) -> None:
    """Of each model at most one price of the past."""
    pushed = current_and_later(prices, now)
    keys = [price.age_key for price in pushed]
    assert keys == sorted(keys, reverse=True)
    for model in ("smollm2", "minilm"):
        past = [price for price in pushed if price.model == model and price.holds_from <= now]
        assert len(past) <= 1


@given(books())
def test_a_price_survives_its_wire_form(prices: list[Price]) -> None:
    """Unset stays unset."""
    for price in prices:
        assert price_from_proto(price_to_proto(price), create_time=price.create_time) == price


@pytest.mark.parametrize(
    "name", ["prices/a", "prices/2026-11-smollm2", "prices/-", f"prices/{'a' * 63}"]
)
def test_names_in_the_form_of_the_contract_are_taken(name: str) -> None:
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
        ("input_nano_usd_per_million_tokens", -1),
        ("cached_input_nano_usd_per_million_tokens", -1),
        ("output_nano_usd_per_million_tokens", MAX_NANO_USD_PER_MILLION_TOKENS + 1),
    ],
)
def test_a_wrong_price_is_refused_by_field(field: str, value: Any) -> None:
    """The violation names the field in the request."""
    with pytest.raises(InvalidArgument) as caught:
        replace(GOOD, **{field: value}).check()
    assert [name for name, _ in caught.value.field_violations] == [f"price.{field}"]


def test_a_time_that_is_none_is_refused() -> None:
    """Seconds beyond the year 9999 are no time."""
    price = price_to_proto(GOOD)
    price.effective_time.seconds = 2**60
    with pytest.raises(InvalidArgument) as caught:
        price_from_proto(cost_pb2.Price.FromString(price.SerializeToString()), create_time=START)
    assert caught.value.field_violations[0][0] == "price.effective_time"


@pytest.mark.parametrize("length", [timedelta(0), timedelta(days=-1)])
def test_a_range_that_does_not_run_forward_is_refused(length: timedelta) -> None:
    """An empty range is a mistake, not a sum of nothing."""
    with pytest.raises(InvalidArgument):
        UsageFilter(tenant="acme", start_time=START, end_time=START + length).check()
