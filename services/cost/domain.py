"""Prices, usage and what the ledger writes down for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby

from headrace.common.v1 import usage_pb2
from headrace.cost.v1 import cost_pb2

from libs.errors import InvalidArgument
from libs.metering.pricing import bill

# With it the bill of the most tokens that one usage can have, 2**31 each way, stays below 2**63.
MAX_NANO_USD_PER_MILLION_TOKENS = 10**15
MAX_INT64 = 2**63 - 1
MAX_NAME_LENGTH = 255
ADJUSTMENT = "adjustment"

_PRICE_ID = re.compile(r"[a-z0-9-]{1,63}")


class InvalidUsageError(ValueError):
    """A usage event that no ledger can book: it names nobody, or its numbers make no sense."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a million tokens of one model cost. Never changes.

    Attributes:
        name: `prices/{price}`.
        model: the model's public name.
        effective_time: from when on it holds; None: from its creation.
    """

    name: str
    model: str
    input_nano_usd_per_million_tokens: int
    cached_input_nano_usd_per_million_tokens: int
    output_nano_usd_per_million_tokens: int
    effective_time: datetime | None
    create_time: datetime

    @property
    def holds_from(self) -> datetime:
        """From when on it holds."""
        return self.effective_time or self.create_time

    @property
    def age_key(self) -> tuple[datetime, str]:
        """Sorts prices from the oldest to the newest, as the hot path does."""
        return self.holds_from, self.name

    def same_content(self, other: Price) -> bool:
        """Whether both ask for the same, whenever they were created."""
        return replace(other, create_time=self.create_time) == self

    def check(self) -> None:
        """Returns if the price may enter the book.

        Raises:
            InvalidArgument: with every field that is wrong.
        """
        wrong = []
        head, _, identifier = self.name.partition("/")
        if head != "prices" or not _PRICE_ID.fullmatch(identifier):
            wrong.append(("price.name", "must be prices/ID with an ID of a-z, 0-9 and -, up to 63"))
        if not 0 < len(self.model) <= MAX_NAME_LENGTH:
            wrong.append(("price.model", f"must have 1 to {MAX_NAME_LENGTH} characters"))
        for kind in ("input", "cached_input", "output"):
            field = f"{kind}_nano_usd_per_million_tokens"
            if not 0 <= getattr(self, field) <= MAX_NANO_USD_PER_MILLION_TOKENS:
                text = f"must be from 0 to {MAX_NANO_USD_PER_MILLION_TOKENS}"
                wrong.append((f"price.{field}", text))
        if wrong:
            raise InvalidArgument.of_fields(wrong)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens that were used, as the event told it; `cost_nano_usd` is what the client was told."""

    usage_id: str
    request_id: str
    tenant: str
    user: str
    model: str
    model_version: str
    operation: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    price: str
    cost_nano_usd: int
    event_time: datetime

    def check(self) -> None:
        """Returns if the usage can be booked.

        Raises:
            InvalidUsageError: it names nobody, or its numbers make no sense.
        """
        if not (self.usage_id and self.request_id and self.tenant):
            raise InvalidUsageError("usage_id, request_id and tenant must be given")
        tokens = (self.prompt_tokens, self.completion_tokens, self.cached_tokens)
        if min(tokens) < 0 or self.cached_tokens > self.prompt_tokens:
            raise InvalidUsageError(f"impossible numbers of tokens {tokens}")
        if not 0 <= self.cost_nano_usd <= MAX_INT64:
            raise InvalidUsageError(f"impossible cost {self.cost_nano_usd}")


@dataclass(frozen=True, kw_only=True)
class Posting:
    """One line of the ledger. The lines of one usage sum up to its `cost_nano_usd`."""

    usage_id: str
    kind: str
    quantity_tokens: int
    price: str
    nano_usd_per_million_tokens: int
    cost_nano_usd: int


@dataclass(frozen=True, kw_only=True)
class UsageSum:
    """What one user used of one model."""

    tenant: str
    user: str
    model: str
    request_count: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cost_nano_usd: int


@dataclass(frozen=True, kw_only=True)
class UsageFilter:
    """Which usage to sum up; None does not filter. `start_time` is in, `end_time` is out."""

    tenant: str
    user: str | None = None
    model: str | None = None
    start_time: datetime | None = None
    end_time: datetime | None = None

    def check(self) -> None:
        """Returns if the range of time is one.

        Raises:
            InvalidArgument: it ends before it starts.
        """
        if self.start_time and self.end_time and self.start_time >= self.end_time:
            raise InvalidArgument.of_field("end_time", "must be after start_time")


def postings_of(usage: Usage, price: Price | None) -> tuple[Posting, ...]:
    """Returns the lines to book: what the named price makes of the tokens.

    Where that is not what the client was told, the client's figure holds and an `adjustment` makes
    up the difference.
    """
    tokens = usage_pb2.TokenUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )
    postings = [
        Posting(
            usage_id=usage.usage_id,
            kind=line.kind,
            quantity_tokens=line.quantity_tokens,
            price=usage.price,
            nano_usd_per_million_tokens=line.nano_usd_per_million_tokens,
            cost_nano_usd=line.cost_nano_usd,
        )
        for line in bill(tokens, _rates(price))
    ]
    difference = usage.cost_nano_usd - sum(posting.cost_nano_usd for posting in postings)
    if difference:
        postings.append(
            Posting(
                usage_id=usage.usage_id,
                kind=ADJUSTMENT,
                quantity_tokens=0,
                price="",
                nano_usd_per_million_tokens=0,
                cost_nano_usd=difference,
            )
        )
    return tuple(postings)


def current_and_later(prices: Iterable[Price], now: datetime) -> list[Price]:
    """Returns, newest first, the prices to come and of each model the one that holds now."""
    kept: list[Price] = []
    for _, of_model in groupby(
        sorted(prices, key=lambda price: (price.model, price.age_key), reverse=True),
        key=lambda price: price.model,
    ):
        for price in of_model:
            kept.append(price)
            if price.holds_from <= now:
                break
    return sorted(kept, key=lambda price: price.age_key, reverse=True)


def checked_sum(amounts: Sequence[int], *, field: str) -> int:
    """Returns the sum of amounts in nano-USD.

    Raises:
        InvalidArgument: it, or one of them, does not fit into 64 bits; `field` asked for too much.
    """
    total = sum(amounts)
    if any(abs(amount) > MAX_INT64 for amount in (total, *amounts)):
        raise InvalidArgument.of_field(field, "the sum does not fit into 64 bits; ask for less")
    return total


def _rates(price: Price | None) -> cost_pb2.Price | None:
    if price is None:
        return None
    return cost_pb2.Price(
        input_nano_usd_per_million_tokens=price.input_nano_usd_per_million_tokens,
        cached_input_nano_usd_per_million_tokens=price.cached_input_nano_usd_per_million_tokens,
        output_nano_usd_per_million_tokens=price.output_nano_usd_per_million_tokens,
    )
