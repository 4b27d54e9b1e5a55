"""`VectorCache`: eviction, and the limit of memory."""

from __future__ import annotations

import gc
import os
import tracemalloc
from collections import OrderedDict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.embedding_cache.domain import Vector
from services.embedding_cache.vector_cache import (
    ENTRY_OVERHEAD_BYTES,
    OWNER_OVERHEAD_BYTES,
    VectorCache,
)

_ENTRY_BYTES = 100 + ENTRY_OVERHEAD_BYTES
_A, _B = "a", "b"


def _vector(token_count: int) -> Vector:
    return Vector(bytes(100), token_count)


def _key(number: int) -> bytes:
    return number.to_bytes(64, "big")


def test_the_least_recently_used_vector_is_evicted_first():
    """A read counts as a use."""
    cache = VectorCache(limit_bytes=OWNER_OVERHEAD_BYTES + 2 * _ENTRY_BYTES)
    cache.put(_A, _key(1), _vector(1))
    cache.put(_A, _key(2), _vector(2))
    assert cache.get(_A, _key(1)) is not None
    cache.put(_A, _key(3), _vector(3))
    assert cache.get(_A, _key(2)) is None
    assert cache.get(_A, _key(1)) == _vector(1)
    assert cache.get(_A, _key(3)) == _vector(3)


def test_a_vector_larger_than_the_limit_is_not_stored():
    """A single vector cannot exceed the limit."""
    cache = VectorCache(limit_bytes=OWNER_OVERHEAD_BYTES + _ENTRY_BYTES - 1)
    cache.put(_A, _key(1), _vector(1))
    assert len(cache) == 0
    assert cache.size_bytes == 0


# Durations depend on the load of the machine.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    limit_vectors=st.integers(0, 5),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=60),
)
def test_any_sequence_of_uses_leaves_the_most_recent_vectors(
    limit_vectors: int, steps: list[tuple[bool, int]]
):
    """The cache has the same vectors as a simple model of it."""
    cache = VectorCache(limit_bytes=OWNER_OVERHEAD_BYTES + limit_vectors * _ENTRY_BYTES)
    model: OrderedDict[int, Vector] = OrderedDict()
    for position, (writes, number) in enumerate(steps):
        if writes:
            model.pop(number, None)
            model[number] = _vector(position)
            cache.put(_A, _key(number), _vector(position))
            while len(model) > limit_vectors:
                model.popitem(last=False)
        else:
            assert cache.get(_A, _key(number)) == model.get(number)
            if number in model:
                model.move_to_end(number)
        assert len(cache) == len(model)
        owner_bytes = OWNER_OVERHEAD_BYTES if model else 0
        assert cache.size_bytes == owner_bytes + len(model) * _ENTRY_BYTES


@pytest.mark.parametrize("count", [1_000, 10_000, 40_000])
def test_the_reported_size_is_the_allocated_memory(count: int):
    """The counted bytes cover what CPython allocates, and exceed it by less than 10 %."""
    cache = VectorCache(limit_bytes=2**40)
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(count):
            cache.put(_A, os.urandom(64), Vector(bytes(1541), 300 + number))
        allocated_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 0.9 * cache.size_bytes < allocated_bytes <= cache.size_bytes


@pytest.mark.parametrize("count", [1_000, 10_000])
def test_the_reported_size_covers_owners_with_one_vector_each(count: int):
    """Many small tenants do not use more memory than is counted."""
    cache = VectorCache(limit_bytes=2**40)
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(count):
            cache.put(f"tenant-{number}-{'x' * 100}", os.urandom(64), Vector(bytes(1541), 300))
        allocated_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 0.7 * cache.size_bytes < allocated_bytes <= cache.size_bytes


def test_a_tenant_that_floods_evicts_its_own_vectors():
    """What another tenant stored before stays, however much the first one stores."""
    cache = VectorCache(limit_bytes=2 * OWNER_OVERHEAD_BYTES + 10 * _ENTRY_BYTES)
    for number in range(5):
        cache.put(_B, _key(number), _vector(number))
    for number in range(1000):
        cache.put(_A, _key(number), _vector(number))
    assert all(cache.get(_B, _key(number)) for number in range(5))
    assert [number for number in range(1000) if cache.get(_A, _key(number))] == [*range(995, 1000)]


def test_a_tenant_alone_uses_the_whole_cache_and_gives_way_to_others():
    """Memory that nobody else needs is used, and returned to an equal share."""
    cache = VectorCache(limit_bytes=2 * OWNER_OVERHEAD_BYTES + 10 * _ENTRY_BYTES)
    for number in range(100):
        cache.put(_A, _key(number), _vector(number))
    assert len(cache) > 10  # the overhead of the second tenant is free, too
    for number in range(100):
        cache.put(_B, _key(number), _vector(number))
    assert sum(cache.get(_A, _key(number)) is not None for number in range(100)) == 5
    assert sum(cache.get(_B, _key(number)) is not None for number in range(100)) == 5


def test_a_key_is_found_by_its_owner_only():
    """Also where two owners use the same key."""
    cache = VectorCache(limit_bytes=2**20)
    cache.put(_A, _key(1), _vector(1))
    assert cache.get(_B, _key(1)) is None
    cache.put(_B, _key(1), _vector(2))
    assert (cache.get(_A, _key(1)), cache.get(_B, _key(1))) == (_vector(1), _vector(2))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(steps=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=60))
def test_nobody_below_an_equal_share_loses_a_vector(steps: list[tuple[int, int]]):
    """Whatever three owners store, only those with the most lose something."""
    cache = VectorCache(limit_bytes=3 * OWNER_OVERHEAD_BYTES + 9 * _ENTRY_BYTES)
    stored: dict[int, set[int]] = {owner: set() for owner in range(3)}
    for owner, number in steps:
        stored[owner].add(number)
        cache.put(str(owner), _key(number), _vector(number))
        left = {
            each: {number for number in numbers if cache.get(str(each), _key(number))}
            for each, numbers in stored.items()
        }
        assert sum(map(len, left.values())) == len(cache)
        most = max(map(len, left.values()))
        assert all(left[each] == stored[each] or len(left[each]) >= most - 1 for each in left)
        stored = left
