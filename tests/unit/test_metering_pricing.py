"""From tokens to money."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from fractions import Fraction

import pytest
from google.protobuf import timestamp_pb2
from headrace.common.v1 import usage_pb2
from headrace.cost.v1 import cost_pb2
from hypothesis import given
from hypothesis import strategies as st

from libs.metering.prices import USAGE_KINDS, PriceBook, rates_of
from libs.metering.pricing import (
    MAX_INT64,
    MAX_NANO_USD_EACH,
    MAX_PER_QUANTITY,
    MAX_QUANTITY,
    Rate,
    UsageKind,
    charges,
    token_quantities,
    total_nano_usd,
)
from libs.metering.usage import cost_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)

PROMPT = UsageKind.PROMPT_TOKENS
CACHED = UsageKind.CACHED_PROMPT_TOKENS
COMPLETION = UsageKind.COMPLETION_TOKENS

counts = st.integers(0, MAX_QUANTITY)
rates = st.integers(1, MAX_PER_QUANTITY).flatmap(
    lambda per: st.integers(0, MAX_NANO_USD_EACH * per).map(lambda nano_usd: Rate(nano_usd, per))
)


def price(name, effective, *, tenant="", **fields):
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(effective)
    return cost_pb2.Price(name=name, model="m", tenant=tenant, effective_time=stamp, **fields)


def quantities(prompt, cached, completion):
    return token_quantities(
        prompt_tokens=prompt, cached_tokens=cached, completion_tokens=completion
    )


def test_cached_tokens_are_billed_at_their_own_price_and_not_twice():
    """Prompt tokens contain the cached ones."""
    by_kind = {
        PROMPT: Rate(100_000_000, 1_000_000),
        CACHED: Rate(25, 1),
        COMPLETION: Rate(400_000, 1_000),
    }
    found = charges(quantities(10, 4, 2), by_kind)
    assert {charge.kind: charge.cost_nano_usd for charge in found} == {
        PROMPT: 600,
        CACHED: 100,
        COMPLETION: 800,
    }
    assert total_nano_usd(quantities(10, 4, 2), by_kind) == 1500
    usage = usage_pb2.TokenUsage(prompt_tokens=10, cached_tokens=4, completion_tokens=2)
    assert cost_of(usage, by_kind) == 1500


@given(counts, rates)
def test_an_amount_is_exact_and_rounded_half_up(count, rate):
    """In integers, for every rate that a price may have."""
    exact = Fraction(count * rate.nano_usd, rate.per_quantity)
    assert rate.cost_nano_usd(count) == int(exact + Fraction(1, 2))


@given(st.dictionaries(st.sampled_from(list(UsageKind)), rates), counts, counts, st.data())
def test_what_the_client_is_charged_is_the_sum_of_the_charges(by_kind, prompt, completion, data):
    """The quick sum of the hot path and the lines of the ledger agree, and fit into 64 bits."""
    used = quantities(prompt, data.draw(st.integers(0, prompt)), completion)
    total = total_nano_usd(used, by_kind)
    assert total == sum(charge.cost_nano_usd for charge in charges(used, by_kind))
    assert total <= MAX_INT64


def test_usage_without_a_rate_is_free_and_still_listed():
    """Its quantity is in the ledger, at no cost."""
    (charge,) = charges(quantities(3, 0, 0), {})
    assert (charge.kind, charge.quantity, charge.cost_nano_usd) == (PROMPT, 3, 0)
    assert total_nano_usd(quantities(3, 0, 0), {}) == 0


def test_impossible_counts_of_a_backend_do_not_fail_the_request():
    """The cost stays within an int64; the ledger rejects such usage."""
    usage = usage_pb2.TokenUsage(completion_tokens=MAX_INT64)
    assert cost_of(usage, {COMPLETION: Rate(MAX_NANO_USD_EACH, 1)}) == MAX_INT64


def test_every_kind_of_the_contract_is_priced():
    """A kind that is added to the contract needs a rule that counts it."""
    declared = set(usage_pb2.UsageKind.values()) - {usage_pb2.USAGE_KIND_UNSPECIFIED}
    assert set(USAGE_KINDS) == declared


def test_rates_are_read_from_the_contract():
    """No quantity means a million; a kind that this version does not know is skipped."""
    read = rates_of(
        price(
            "prices/p",
            NOW,
            rates=[
                cost_pb2.Rate(kind=usage_pb2.USAGE_KIND_PROMPT_TOKENS, nano_usd=7),
                cost_pb2.Rate(
                    kind=usage_pb2.USAGE_KIND_COMPLETION_TOKENS, nano_usd=8, per_quantity=1
                ),
                cost_pb2.Rate(kind=99, nano_usd=9, per_quantity=1),  # type: ignore[arg-type]  # of a later version
            ],
        )
    )
    assert read == {PROMPT: Rate(7, 1_000_000), COMPLETION: Rate(8, 1)}


def test_the_newest_price_in_effect_applies():
    """A later price replaces an earlier one when it takes effect, not when it is created."""
    old, new = price("prices/old", NOW), price("prices/new", NOW + timedelta(hours=1))
    book = PriceBook([new, old])

    def name_at(moment, model="m"):
        found = book.price_of(model, moment)
        return found and found.name

    assert name_at(NOW - timedelta(seconds=1)) is None
    assert name_at(NOW) == "prices/old"
    assert name_at(NOW + timedelta(hours=1)) == "prices/new"
    assert name_at(NOW, model="other") is None


@pytest.mark.parametrize("own_effective", [NOW - timedelta(days=1), NOW])
def test_a_price_of_the_tenant_goes_before_the_general_one(own_effective):
    """Whichever of them is newer; and only for that tenant and once it is in effect."""
    book = PriceBook(
        [
            price("prices/general", NOW - timedelta(hours=1)),
            price("prices/own", own_effective, tenant="tenants/acme"),
        ]
    )

    def name_for(tenant, moment=NOW):
        found = book.price_of("m", moment, tenant=tenant)
        return found and found.name

    assert name_for("acme") == "prices/own"
    assert name_for("other") == "prices/general"
    assert name_for("") == "prices/general"
    before = own_effective - timedelta(minutes=1)
    assert name_for("acme", before) != "prices/own"
