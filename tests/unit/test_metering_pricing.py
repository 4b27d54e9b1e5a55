"""From tokens to money."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from google.protobuf import timestamp_pb2
from headrace.common.v1 import usage_pb2
from headrace.cost.v1 import cost_pb2
from hypothesis import given
from hypothesis import strategies as st

from libs.metering.prices import PriceBook
from libs.metering.pricing import bill, total_nano_usd

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def price(name, effective, **amounts):
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(effective)
    return cost_pb2.Price(name=name, model="m", effective_time=stamp, **amounts)


def test_cached_tokens_are_billed_at_their_own_price_and_not_twice():
    """Prompt tokens contain the cached ones."""
    usage = usage_pb2.TokenUsage(prompt_tokens=10, cached_tokens=4, completion_tokens=2)
    lines = bill(
        usage,
        price(
            "prices/p",
            NOW,
            input_nano_usd_per_million_tokens=100_000_000,
            cached_input_nano_usd_per_million_tokens=25_000_000,
            output_nano_usd_per_million_tokens=400_000_000,
        ),
    )
    assert {line.kind: line.cost_nano_usd for line in lines} == {
        "input": 600,
        "cached_input": 100,
        "output": 800,
    }
    assert total_nano_usd(lines) == 1500


@given(tokens=st.integers(0, 2**31 - 1), rate=st.integers(0, 10**12))
def test_an_amount_is_off_by_half_a_nano_dollar_at_most(tokens, rate):
    """Rounding is half up, in integers at any size."""
    usage = usage_pb2.TokenUsage(completion_tokens=tokens)
    total = total_nano_usd(bill(usage, price("p", NOW, output_nano_usd_per_million_tokens=rate)))
    assert abs(total * 1_000_000 - tokens * rate) <= 500_000


def test_a_model_without_price_is_free_and_still_listed():
    """Its tokens are on the bill, at nothing."""
    lines = bill(usage_pb2.TokenUsage(prompt_tokens=3), None)
    assert [(line.quantity_tokens, line.cost_nano_usd) for line in lines] == [(3, 0)]


def test_the_newest_price_in_effect_holds():
    """A later price takes over at its time, not when it is written."""
    old, new = price("prices/old", NOW), price("prices/new", NOW + timedelta(hours=1))
    book = PriceBook([new, old])
    assert book.price_of("m", NOW - timedelta(seconds=1)) is None
    assert book.price_of("m", NOW) is old
    assert book.price_of("m", NOW + timedelta(hours=1)) is new
    assert book.price_of("other", NOW) is None
