"""The ledger's lines sum up to what the client was told, to the nano-dollar."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.errors import InvalidArgument
from services.cost.domain import (
    ADJUSTMENT,
    MAX_INT64,
    MAX_NANO_USD_PER_MILLION_TOKENS,
    InvalidUsageError,
    Price,
    Usage,
    checked_sum,
    postings_of,
)

NOW = datetime(2026, 11, 1, tzinfo=UTC)
MAX_TOKENS = 2**31 - 1

rates = st.integers(0, MAX_NANO_USD_PER_MILLION_TOKENS)
tokens = st.integers(0, MAX_TOKENS)


def price_of(input_rate: int, cached_rate: int, output_rate: int) -> Price:
    return Price(
        name="prices/one",
        model="smollm2",
        input_nano_usd_per_million_tokens=input_rate,
        cached_input_nano_usd_per_million_tokens=cached_rate,
        output_nano_usd_per_million_tokens=output_rate,
        effective_time=None,
        create_time=NOW,
    )


def usage_of(prompt: int, completion: int, cached: int, cost: int = 0) -> Usage:
    return Usage(
        usage_id="usage",
        request_id="request",
        tenant="acme",
        user="ann",
        model="smollm2",
        model_version="models/smollm2/versions/1.0.0",
        operation="generate",
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_tokens=cached,
        price="prices/one",
        cost_nano_usd=cost,
        event_time=NOW,
    )


def half_up(exact: Fraction) -> int:
    return int(exact + Fraction(1, 2))


@st.composite
def priced_usage(draw):
    prompt = draw(tokens)
    usage = usage_of(prompt, draw(tokens), draw(st.integers(0, prompt)))
    return usage, price_of(draw(rates), draw(rates), draw(rates))


@given(priced_usage())
def test_each_line_is_its_exact_amount_rounded_half_up(case) -> None:
    """No floats come near money, however large the numbers."""
    usage, price = case
    expected = {
        "input": (
            usage.prompt_tokens - usage.cached_tokens,
            price.input_nano_usd_per_million_tokens,
        ),
        "cached_input": (usage.cached_tokens, price.cached_input_nano_usd_per_million_tokens),
        "output": (usage.completion_tokens, price.output_nano_usd_per_million_tokens),
    }
    for line in postings_of(usage, price):
        if line.kind == ADJUSTMENT:
            continue
        quantity, rate = expected.pop(line.kind)
        assert (line.quantity_tokens, line.nano_usd_per_million_tokens) == (quantity, rate)
        assert line.cost_nano_usd == half_up(Fraction(quantity * rate, 1_000_000))
    assert all(quantity == 0 for quantity, _ in expected.values())


@given(priced_usage())
def test_a_client_told_the_price_gets_no_adjustment(case) -> None:
    """What the hot path computes is what the ledger computes."""
    usage, price = case
    cost = sum(line.cost_nano_usd for line in postings_of(usage, price) if line.kind != ADJUSTMENT)
    lines = postings_of(replace(usage, cost_nano_usd=cost), price)
    assert all(line.kind != ADJUSTMENT for line in lines)
    assert sum(line.cost_nano_usd for line in lines) == cost


@given(priced_usage(), st.integers(0, MAX_INT64), st.booleans())
def test_the_lines_sum_up_to_what_the_client_was_told(case, told: int, price_known: bool) -> None:
    """Whatever the event says, and whether its price is known or not; and each line fits SQL."""
    usage, price = case
    lines = postings_of(replace(usage, cost_nano_usd=told), price if price_known else None)
    assert sum(line.cost_nano_usd for line in lines) == told
    assert sum(line.kind == ADJUSTMENT for line in lines) <= 1
    assert all(abs(line.cost_nano_usd) <= MAX_INT64 for line in lines)


def test_the_dearest_bill_fits_into_64_bits() -> None:
    """The highest price times the most tokens that an event can carry is still bookable."""
    highest = MAX_NANO_USD_PER_MILLION_TOKENS
    usage = usage_of(MAX_TOKENS, MAX_TOKENS, 0)
    cost = sum(
        line.cost_nano_usd
        for line in postings_of(usage, price_of(highest, highest, highest))
        if line.kind != ADJUSTMENT
    )
    replace(usage, cost_nano_usd=cost).check()
    assert cost > MAX_INT64 // 4


def test_a_mismatch_is_booked_as_an_adjustment() -> None:
    """The client's figure stands, and the difference shows as what it is."""
    lines = postings_of(usage_of(10, 0, 0, cost=7), price_of(1_000_000, 0, 0))
    assert [
        (line.kind, line.quantity_tokens, line.price, line.cost_nano_usd) for line in lines
    ] == [
        ("input", 10, "prices/one", 10),
        ("adjustment", 0, "", -3),
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"usage_id": ""},
        {"request_id": ""},
        {"tenant": ""},
        {"prompt_tokens": -1},
        {"completion_tokens": -1},
        {"cached_tokens": 11},
        {"cost_nano_usd": -1},
    ],
)
def test_nonsense_is_not_booked(wrong: dict[str, Any]) -> None:
    """A ledger line belongs to somebody and has numbers that can be."""
    usage = usage_of(10, 0, 0)
    usage.check()
    with pytest.raises(InvalidUsageError):
        replace(usage, **wrong).check()


@given(st.lists(st.integers(0, MAX_INT64), max_size=4))
def test_a_sum_is_exact_or_refused(amounts: list[int]) -> None:
    """A total that 64 bits do not hold is an error of the request, never a wrong number."""
    if sum(amounts) <= MAX_INT64:
        assert checked_sum(amounts, field="start_time") == sum(amounts)
    else:
        with pytest.raises(InvalidArgument) as caught:
            checked_sum(amounts, field="start_time")
        assert caught.value.field_violations[0][0] == "start_time"
