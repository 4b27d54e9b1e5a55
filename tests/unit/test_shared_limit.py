"""`SharedLimit`: what one holder may hold of a limit that many share."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.shared_limit import SharedLimit


def _fill(limit: SharedLimit, holder: str) -> int:
    while limit.take(holder):
        pass
    return limit.held_by(holder)


def test_a_holder_alone_leaves_room_for_the_next():
    """With alpha 2 it gets two thirds; the second one gets a third of the rest, and so on."""
    limit = SharedLimit(90, alpha=2.0)
    assert _fill(limit, "a") == 60
    assert _fill(limit, "b") == 20
    assert limit.has_room("c")
    assert not limit.has_room("a")


def test_the_share_is_what_a_holder_can_reach():
    """The number for error messages is the number that holds."""
    limit = SharedLimit(1000, alpha=2.0)
    _fill(limit, "a")
    expected = limit.share_of("b")
    assert abs(_fill(limit, "b") - expected) <= 1


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_small_limit_can_be_used_up(count: int):
    """A holder that is alone does not leave one of few places free."""
    assert _fill(SharedLimit(count, alpha=4.0), "a") == count


def test_an_amount_beyond_what_is_free_is_refused():
    """The total holds for everybody."""
    limit = SharedLimit(10, alpha=2.0)
    assert not limit.take("a", 11)
    assert limit.take("a", 10)
    assert not limit.take("b", 1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 7), st.booleans()), max_size=100))
def test_any_sequence_keeps_the_total_and_forgets_who_holds_nothing(steps):
    """What is held is never more than the limit, and everything can be given back."""
    limit = SharedLimit(40, alpha=1.0)
    held: list[tuple[str, int]] = []
    for holder, amount, takes in steps:
        if takes:
            expected = limit.has_room(str(holder), amount)
            assert limit.take(str(holder), amount) == expected
            if expected:
                held.append((str(holder), amount))
        elif held:
            limit.release(*held.pop(0))
        assert limit.used == sum(amount for _, amount in held) <= 40
    for holder, amount in held:
        limit.release(holder, amount)
    assert limit.used == 0
    assert not limit._held
