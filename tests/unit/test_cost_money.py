"""The postings of a usage add up to the cost that the client was given, to the nano-dollar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.errors import InvalidArgument
from libs.metering.pricing import (
    MAX_INT64,
    MAX_NANO_USD_EACH,
    MAX_PER_QUANTITY,
    MAX_QUANTITY,
    Rate,
    UsageKind,
)
from services.cost.domain import (
    InvalidUsageError,
    PostingKind,
    Price,
    Usage,
    checked_sum,
    postings_of,
)

NOW = datetime(2026, 11, 1, tzinfo=UTC)
HIGHEST = Rate(MAX_NANO_USD_EACH * MAX_PER_QUANTITY, MAX_PER_QUANTITY)

rates = st.integers(1, MAX_PER_QUANTITY).flatmap(
    lambda per: st.integers(0, MAX_NANO_USD_EACH * per).map(lambda nano_usd: Rate(nano_usd, per))
)
counts = st.integers(0, MAX_QUANTITY)


def price_of(by_kind: Mapping[UsageKind, Rate]) -> Price:
    return Price(
        name="prices/one",
        model="smollm2",
        tenant="",
        rates=by_kind,
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
        reasoning_tokens=0,
        price="prices/one",
        cost_nano_usd=cost,
        event_time=NOW,
    )


def charged(usage: Usage, price: Price) -> int:
    """Returns the sum of the charges, whatever the client was given."""
    lines = postings_of(usage, price)
    return sum(line.cost_nano_usd for line in lines if line.kind is PostingKind.CHARGE)


@st.composite
def priced_usage(draw):
    prompt = draw(counts)
    usage = usage_of(prompt, draw(counts), draw(st.integers(0, prompt)))
    by_kind = st.dictionaries(st.sampled_from(list(UsageKind)), rates)
    return usage, price_of(draw(by_kind))


@given(priced_usage())
def test_each_charge_is_its_exact_amount_rounded_half_up(case) -> None:
    """In integers, however large the numbers; a kind without a rate is free."""
    usage, price = case
    expected = {
        UsageKind.PROMPT_TOKENS: usage.prompt_tokens - usage.cached_tokens,
        UsageKind.CACHED_PROMPT_TOKENS: usage.cached_tokens,
        UsageKind.COMPLETION_TOKENS: usage.completion_tokens,
    }
    for line in postings_of(usage, price):
        if line.usage_kind is None:
            continue
        assert line.quantity == expected.pop(line.usage_kind)
        rate = price.rates.get(line.usage_kind, Rate(0, 1_000_000))
        assert (line.rate_nano_usd, line.rate_per_quantity) == rate
        exact = Fraction(line.quantity * rate.nano_usd, rate.per_quantity)
        assert line.cost_nano_usd == int(exact + Fraction(1, 2))
    assert all(quantity == 0 for quantity in expected.values())


@given(priced_usage())
def test_a_cost_that_follows_the_price_needs_no_adjustment(case) -> None:
    """What the hot path computes is what the ledger computes."""
    usage, price = case
    cost = charged(usage, price)
    lines = postings_of(replace(usage, cost_nano_usd=cost), price)
    assert all(line.kind is PostingKind.CHARGE for line in lines)
    assert sum(line.cost_nano_usd for line in lines) == cost


@given(priced_usage(), st.integers(0, MAX_INT64), st.booleans())
def test_the_postings_add_up_to_the_cost_that_was_reported(
    case, reported: int, price_known: bool
) -> None:
    """Whatever the event has, and whether its price is known or not; and each fits into SQL."""
    usage, price = case
    lines = postings_of(replace(usage, cost_nano_usd=reported), price if price_known else None)
    assert sum(line.cost_nano_usd for line in lines) == reported
    assert sum(line.kind is PostingKind.ADJUSTMENT for line in lines) <= 1
    assert all(abs(line.cost_nano_usd) <= MAX_INT64 for line in lines)


def test_the_highest_cost_fits_into_64_bits() -> None:
    """The highest price times the highest counts that are booked can be booked."""
    usage = usage_of(MAX_QUANTITY, MAX_QUANTITY, 0)
    cost = charged(usage, price_of(dict.fromkeys(UsageKind, HIGHEST)))
    replace(usage, cost_nano_usd=cost).check()
    assert cost > MAX_INT64 // 4


def test_a_mismatch_is_booked_as_an_adjustment() -> None:
    """The cost that the client was given stands, and the difference is visible."""
    price = price_of({UsageKind.PROMPT_TOKENS: Rate(1, 1)})
    lines = postings_of(usage_of(10, 0, 0, cost=7), price)
    assert [
        (line.kind, line.usage_kind, line.quantity, line.price, line.cost_nano_usd)
        for line in lines
    ] == [
        (PostingKind.CHARGE, UsageKind.PROMPT_TOKENS, 10, "prices/one", 10),
        (PostingKind.ADJUSTMENT, None, 0, "", -3),
    ]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"usage_id": ""}, "incomplete"),
        ({"request_id": ""}, "incomplete"),
        ({"tenant": ""}, "incomplete"),
        ({"prompt_tokens": -1}, "impossible_count"),
        ({"completion_tokens": -1}, "impossible_count"),
        ({"cached_tokens": 11}, "impossible_count"),
        ({"reasoning_tokens": 1}, "impossible_count"),
        ({"prompt_tokens": MAX_QUANTITY + 1}, "impossible_count"),
        ({"completion_tokens": MAX_INT64}, "impossible_count"),
        ({"cost_nano_usd": -1}, "impossible_cost"),
    ],
)
def test_impossible_usage_is_rejected_with_a_reason(wrong: dict[str, Any], reason: str) -> None:
    """A posting has a tenant, and numbers that a request can have."""
    usage = usage_of(10, 0, 0)
    usage.check()
    with pytest.raises(InvalidUsageError) as caught:
        replace(usage, **wrong).check()
    assert caught.value.reason == reason


@given(st.lists(st.integers(0, MAX_INT64), max_size=4))
def test_a_sum_is_exact_or_refused(amounts: list[int]) -> None:
    """A total beyond 64 bits is an error of the request, never a wrong number."""
    if sum(amounts) <= MAX_INT64:
        assert checked_sum(amounts, field="start_time") == sum(amounts)
    else:
        with pytest.raises(InvalidArgument) as caught:
            checked_sum(amounts, field="start_time")
        assert caught.value.field_violations[0][0] == "start_time"
