"""The speed and the cost of an answer."""

from __future__ import annotations

import pytest

from cli.options import dollars
from deploy.client.answers import tokens_per_second


@pytest.mark.parametrize(
    ("nano_usd", "text"),
    [
        (0, "$0.000000000"),
        (1, "$0.000000001"),
        (26_700, "$0.000026700"),
        (1_000_000_000, "$1.000000000"),
        (12_345_678_901, "$12.345678901"),
    ],
)
def test_dollars_are_exact(nano_usd: int, text: str):
    """To the nano-dollar: money is never a float."""
    assert dollars(nano_usd) == text


def test_speed_leaves_the_first_token_out():
    """The wait for it is the prompt's, not the generation's."""
    assert tokens_per_second([(10.0, 1), (10.5, 5), (11.0, 5)]) == pytest.approx(10.0)


@pytest.mark.parametrize("arrivals", [[], [(1.0, 3)], [(1.0, 3), (1.0, 3)]])
def test_there_is_no_speed_without_an_interval(arrivals: list[tuple[float, int]]):
    """One message, or all at once, says nothing of the speed."""
    assert tokens_per_second(arrivals) == 0
