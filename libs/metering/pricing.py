"""From usage to money, in whole nano-USD.

Integers only: what a client is charged and what the ledger computes later agree exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple, TypeAlias

MAX_INT64 = 2**63 - 1
# With more tokens than this of a kind, or a higher rate than `MAX_NANO_USD_EACH`, costs could
# exceed 64 bits.
MAX_QUANTITY = 2**31
MAX_NANO_USD_EACH = 10**9
MAX_PER_QUANTITY = 1_000_000


class UsageKind(StrEnum):
    """What is counted and priced. The kinds do not overlap: their quantities add up.

    The names are those of `headrace.common.v1.UsageKind` without its prefix; the values are stored.
    """

    PROMPT_TOKENS = "prompt_tokens"
    CACHED_PROMPT_TOKENS = "cached_prompt_tokens"
    COMPLETION_TOKENS = "completion_tokens"


class Rate(NamedTuple):
    """What one kind of usage costs: `nano_usd` for `per_quantity`."""

    nano_usd: int
    per_quantity: int

    def cost_nano_usd(self, quantity: int) -> int:
        """Returns the cost of a quantity, rounded half up."""
        return (quantity * self.nano_usd + self.per_quantity // 2) // self.per_quantity


FREE = Rate(0, MAX_PER_QUANTITY)

Rates: TypeAlias = Mapping[UsageKind, Rate]


class Charge(NamedTuple):
    """The cost of one kind of usage."""

    kind: UsageKind
    quantity: int
    rate: Rate
    cost_nano_usd: int


def token_quantities(
    *, prompt_tokens: int, cached_tokens: int, completion_tokens: int
) -> tuple[tuple[UsageKind, int], ...]:
    """Returns the quantity of each kind; `prompt_tokens` include the cached ones."""
    return (
        (UsageKind.PROMPT_TOKENS, prompt_tokens - cached_tokens),
        (UsageKind.CACHED_PROMPT_TOKENS, cached_tokens),
        (UsageKind.COMPLETION_TOKENS, completion_tokens),
    )


def charges(quantities: Iterable[tuple[UsageKind, int]], rates: Rates) -> list[Charge]:
    """Returns the charge of each kind that was used; a kind without a rate is free."""
    found = []
    for kind, quantity in quantities:
        if quantity:
            rate = rates.get(kind, FREE)
            found.append(Charge(kind, quantity, rate, rate.cost_nano_usd(quantity)))
    return found


def total_nano_usd(quantities: Iterable[tuple[UsageKind, int]], rates: Rates) -> int:
    """Returns the sum of the charges."""
    return sum([rates[kind].cost_nano_usd(n) for kind, n in quantities if kind in rates])
