"""The vectors that are kept: in memory, up to so many bytes, the least recently used go first.

One ordered dictionary of our own, because cachetools' keeps the sizes in a second one and does not
tell what it evicts.
"""

from __future__ import annotations

from collections import OrderedDict

from services.embedding_cache import metrics
from services.embedding_cache.domain import Vector

# What CPython 3.11 needs for an entry beside the vector's own bytes (key, `Vector`, dictionary):
# 285 to 315, by how full the dictionary is. A test holds it against tracemalloc.
ENTRY_OVERHEAD_BYTES = 320


class VectorCache:
    """Vectors by key. Not for threads."""

    def __init__(self, *, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._size_bytes = 0
        self._vectors: OrderedDict[bytes, Vector] = OrderedDict()
        metrics.LIMIT_BYTES.set(limit_bytes)

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def size_bytes(self) -> int:
        """Memory of all entries, never above the limit."""
        return self._size_bytes

    def get(self, key: bytes) -> Vector | None:
        """Returns a vector, which is the most recently used from now on, or None."""
        vector = self._vectors.get(key)
        if vector is not None:
            self._vectors.move_to_end(key)
        return vector

    def put(self, key: bytes, vector: Vector) -> None:
        """Keeps a vector and evicts what it leaves no room for."""
        known = self._vectors.pop(key, None)
        if known is not None:
            self._size_bytes -= _entry_bytes(known)
        self._vectors[key] = vector
        self._size_bytes += _entry_bytes(vector)
        while self._size_bytes > self._limit_bytes:
            _, evicted = self._vectors.popitem(last=False)
            self._size_bytes -= _entry_bytes(evicted)
            metrics.EVICTED_VECTORS.inc()
        metrics.SIZE_BYTES.set(self._size_bytes)
        metrics.SIZE_VECTORS.set(len(self._vectors))


def _entry_bytes(vector: Vector) -> int:
    return len(vector.encoded) + ENTRY_OVERHEAD_BYTES
