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
from services.embedding_cache.vector_cache import ENTRY_OVERHEAD_BYTES, VectorCache

_ENTRY_BYTES = 100 + ENTRY_OVERHEAD_BYTES


def _vector(token_count: int) -> Vector:
    return Vector(bytes(100), token_count)


def _key(number: int) -> bytes:
    return number.to_bytes(64, "big")


def test_the_least_recently_used_vector_is_evicted_first():
    """A read counts as a use."""
    cache = VectorCache(limit_bytes=2 * _ENTRY_BYTES)
    cache.put(_key(1), _vector(1))
    cache.put(_key(2), _vector(2))
    assert cache.get(_key(1)) is not None
    cache.put(_key(3), _vector(3))
    assert cache.get(_key(2)) is None
    assert cache.get(_key(1)) == _vector(1)
    assert cache.get(_key(3)) == _vector(3)


def test_a_vector_larger_than_the_limit_is_not_stored():
    """A single vector cannot exceed the limit."""
    cache = VectorCache(limit_bytes=_ENTRY_BYTES - 1)
    cache.put(_key(1), _vector(1))
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
    cache = VectorCache(limit_bytes=limit_vectors * _ENTRY_BYTES)
    model: OrderedDict[int, Vector] = OrderedDict()
    for position, (writes, number) in enumerate(steps):
        if writes:
            model.pop(number, None)
            model[number] = _vector(position)
            cache.put(_key(number), _vector(position))
            while len(model) > limit_vectors:
                model.popitem(last=False)
        else:
            assert cache.get(_key(number)) == model.get(number)
            if number in model:
                model.move_to_end(number)
        assert len(cache) == len(model)
        assert cache.size_bytes == len(model) * _ENTRY_BYTES


@pytest.mark.parametrize("count", [1_000, 10_000, 40_000])
def test_the_reported_size_is_the_allocated_memory(count: int):
    """The counted bytes cover what CPython allocates, and exceed it by less than 10 %."""
    cache = VectorCache(limit_bytes=2**40)
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(count):
            cache.put(os.urandom(64), Vector(bytes(1541), 300 + number))
        allocated_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 0.9 * cache.size_bytes < allocated_bytes <= cache.size_bytes
