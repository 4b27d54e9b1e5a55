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


def test_the_threshold_holds_after_a_large_amount():
    """A party below its threshold cannot take all that is free with one request."""
    limit = SharedLimit(256, alpha=1.0)
    assert limit.take("a", 50)
    assert limit.take("a", 50)
    assert not limit.take("a", 156)
    assert not limit.take("a", 29)
    assert limit.take("a", 28)
    assert limit.take("b", 20)


def test_an_amount_beyond_the_share_is_given_only_while_nobody_holds_anything():
    """Else a party that holds nothing could take all that the others left."""
    limit = SharedLimit(256, alpha=1.0)
    assert limit.take("a", 192)
    limit.release("a", 192)
    assert limit.take("b", 1)
    assert not limit.take("a", 192)
    assert not limit.take("a", 129)
    assert limit.take("a", 128)
    assert limit.take("c", 100)


@given(st.integers(1, 50), st.integers(1, 50), st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_one_large_amount_ends_where_many_small_ones_do(others: int, amount: int, alpha: float):
    """A party that holds something reaches the same, however it asks."""
    at_once, single = SharedLimit(100, alpha=alpha), SharedLimit(100, alpha=alpha)
    for limit in (at_once, single):
        limit.take("b", others)
        limit.take("a")
    taken = all(single.take("a") for _ in range(amount))
    assert at_once.take("a", amount) == taken


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
