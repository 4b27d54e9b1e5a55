"""Prices, usage, and what the ledger writes for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from itertools import groupby

from libs.errors import InvalidArgument
from libs.metering.pricing import (
    MAX_INT64,
    MAX_NANO_USD_EACH,
    MAX_PER_QUANTITY,
    MAX_QUANTITY,
    Rate,
    UsageKind,
    charges,
    token_quantities,
)

MAX_NAME_LENGTH = 255
ALL_TENANTS = "-"

_PRICE_ID = re.compile(r"[a-z0-9-]{1,63}")


class InvalidUsageError(ValueError):
    """A usage event that cannot be booked.

    Attributes:
        reason: what is wrong: `incomplete`, `impossible_count` or `impossible_cost`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Price:
    """What one model costs. Never changes.

    Attributes:
        name: `prices/{price}`.
        model: the model's public name.
        tenant: the only tenant that pays it; empty: all that have no price of their own.
        rates: of each kind that is not free.
        effective_time: when it takes effect; None: when it is created.
    """

    name: str
    model: str
    tenant: str
    rates: Mapping[UsageKind, Rate]
    effective_time: datetime | None
    create_time: datetime

    @property
    def effective_from(self) -> datetime:
        """When it takes effect."""
        return self.effective_time or self.create_time

    @property
    def age_key(self) -> tuple[datetime, str]:
        """Sorts prices from the oldest to the newest, as the services that apply them do."""
        return self.effective_from, self.name

    def same_content(self, other: Price) -> bool:
        """Returns whether both are the same, apart from when they were created."""
        return replace(other, create_time=self.create_time) == self

    def check(self) -> None:
        """Checks that the price may be created.

        Raises:
            InvalidArgument: with every field that is wrong.
        """
        wrong = []
        head, _, identifier = self.name.partition("/")
        if head != "prices" or not _PRICE_ID.fullmatch(identifier):
            wrong.append(
                ("price.name", "must be prices/ID with an ID of a-z, 0-9 and -, at most 63")
            )
        if not 0 < len(self.model) <= MAX_NAME_LENGTH or "\0" in self.model:
            wrong.append(("price.model", f"must have 1 to {MAX_NAME_LENGTH} characters"))
        if self.tenant == ALL_TENANTS:
            wrong.append(("price.tenant", "must be one tenant, or empty for all"))
        if not self.rates:
            wrong.append(("price.rates", "must have at least one rate"))
        for position, rate in enumerate(self.rates.values()):
            wrong += _wrong_fields(rate, f"price.rates[{position}]")
        if wrong:
            raise InvalidArgument.of_fields(wrong)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """The tokens of one usage event; `cost_nano_usd` is the cost that the client was given.

    Attributes:
        operation: see `wire.operation_from_proto`.
    """

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
    reasoning_tokens: int
    price: str
    cost_nano_usd: int
    event_time: datetime

    def check(self) -> None:
        """Checks that the usage can be booked.

        Raises:
            InvalidUsageError: an id or the tenant is missing, or a number is impossible.
        """
        if not (self.usage_id and self.request_id and self.tenant):
            raise InvalidUsageError("incomplete", "usage_id, request_id and tenant are required")
        counts = {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "reasoning_tokens": self.reasoning_tokens,
        }
        for name, count in counts.items():
            if not 0 <= count <= MAX_QUANTITY:
                raise InvalidUsageError(
                    "impossible_count", f"{name} is {count}, not from 0 to {MAX_QUANTITY}"
                )
        for part, total in (("cached", "prompt"), ("reasoning", "completion")):
            if counts[f"{part}_tokens"] > counts[f"{total}_tokens"]:
                raise InvalidUsageError(
                    "impossible_count", f"more {part}_tokens than {total}_tokens: {counts}"
                )
        if not 0 <= self.cost_nano_usd <= MAX_INT64:
            raise InvalidUsageError(
                "impossible_cost", f"cost_nano_usd is {self.cost_nano_usd}, not from 0 to 2^63 - 1"
            )


class PostingKind(StrEnum):
    """Why a posting was made. The names are those of the contract; the values are stored."""

    CHARGE = "charge"
    ADJUSTMENT = "adjustment"


@dataclass(frozen=True, kw_only=True)
class Posting:
    """One line of the ledger. The postings of a usage add up to its `cost_nano_usd`.

    Attributes:
        usage_kind: what is charged; None for an adjustment.
    """

    usage_id: str
    kind: PostingKind
    usage_kind: UsageKind | None
    quantity: int
    price: str
    rate_nano_usd: int
    rate_per_quantity: int
    cost_nano_usd: int


def postings_of(usage: Usage, price: Price | None) -> tuple[Posting, ...]:
    """Returns the postings of a usage: what it costs by the price that its event names.

    Where the client was given another cost, that cost stands: an adjustment corrects the sum.
    """
    postings = list(_charge_postings(usage, price))
    difference = usage.cost_nano_usd - sum(posting.cost_nano_usd for posting in postings)
    if difference:
        postings.append(
            Posting(
                usage_id=usage.usage_id,
                kind=PostingKind.ADJUSTMENT,
                usage_kind=None,
                quantity=0,
                price="",
                rate_nano_usd=0,
                rate_per_quantity=0,
                cost_nano_usd=difference,
            )
        )
    return tuple(postings)


def current_and_later(prices: Iterable[Price], now: datetime) -> list[Price]:
    """Returns the prices that a process needs from now on, the newest first.

    For each model and tenant, these are the one in effect and those that take effect later.
    """

    def payer(price: Price) -> tuple[str, str]:
        return price.model, price.tenant

    needed: list[Price] = []
    newest_first = sorted(prices, key=lambda price: (payer(price), price.age_key), reverse=True)
    for _, of_payer in groupby(newest_first, key=payer):
        for price in of_payer:
            needed.append(price)
            if price.effective_from <= now:
                break
    return sorted(needed, key=lambda price: price.age_key, reverse=True)


def checked_sum(amounts: Iterable[int], *, field: str) -> int:
    """Returns the sum of amounts in nano-USD.

    Raises:
        InvalidArgument: the sum does not fit into 64 bits; `field` selects too much.
    """
    total = sum(amounts)
    if abs(total) > MAX_INT64:
        raise InvalidArgument.of_field(field, "the sum does not fit into 64 bits; select less")
    return total


def _charge_postings(usage: Usage, price: Price | None) -> Iterator[Posting]:
    quantities = token_quantities(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
    )
    for charge in charges(quantities, price.rates if price else {}):
        yield Posting(
            usage_id=usage.usage_id,
            kind=PostingKind.CHARGE,
            usage_kind=charge.kind,
            quantity=charge.quantity,
            price=usage.price,
            rate_nano_usd=charge.rate.nano_usd,
            rate_per_quantity=charge.rate.per_quantity,
            cost_nano_usd=charge.cost_nano_usd,
        )


def _wrong_fields(rate: Rate, field: str) -> Iterator[tuple[str, str]]:
    if not 1 <= rate.per_quantity <= MAX_PER_QUANTITY:
        yield f"{field}.per_quantity", f"must be from 1 to {MAX_PER_QUANTITY}"
    elif not 0 <= rate.nano_usd <= MAX_NANO_USD_EACH * rate.per_quantity:
        yield f"{field}.nano_usd", f"must be from 0 to {MAX_NANO_USD_EACH} times per_quantity"
