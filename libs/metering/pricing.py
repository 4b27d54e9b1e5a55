"""From tokens to money. Integers only: hot path and ledger must agree to the nano-dollar."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.common.v1 import usage_pb2
from headrace.cost.v1 import cost_pb2

TOKENS_PER_PRICE = 1_000_000


@dataclass(frozen=True)
class Line:
    """One line of a bill."""

    kind: str
    quantity_tokens: int
    nano_usd_per_million_tokens: int

    @property
    def cost_nano_usd(self) -> int:
        """The amount, rounded half up to whole nano-USD."""
        exact = self.quantity_tokens * self.nano_usd_per_million_tokens
        return (exact + TOKENS_PER_PRICE // 2) // TOKENS_PER_PRICE


def bill(usage: usage_pb2.TokenUsage, price: cost_pb2.Price | None) -> tuple[Line, ...]:
    """Returns the lines of what was used; those of no tokens are left out. No price: all free."""
    price = price or cost_pb2.Price()
    lines = (
        Line(
            "input",
            usage.prompt_tokens - usage.cached_tokens,
            price.input_nano_usd_per_million_tokens,
        ),
        Line("cached_input", usage.cached_tokens, price.cached_input_nano_usd_per_million_tokens),
        Line("output", usage.completion_tokens, price.output_nano_usd_per_million_tokens),
    )
    return tuple(line for line in lines if line.quantity_tokens)


def total_nano_usd(lines: tuple[Line, ...]) -> int:
    """Returns the sum of a bill."""
    return sum(line.cost_nano_usd for line in lines)
