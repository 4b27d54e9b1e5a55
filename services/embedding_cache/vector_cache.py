"""An LRU cache of vectors in memory, limited by bytes."""

from __future__ import annotations

from collections import OrderedDict

from services.embedding_cache import metrics
from services.embedding_cache.domain import Vector

# Memory of one entry in CPython 3.11 without the encoded vector (key, `Vector`, dictionary slot):
# 285 to 315 bytes, depending on how full the dictionary is. A test compares it with tracemalloc.
ENTRY_OVERHEAD_BYTES = 320


class VectorCache:
    """Vectors by key; evicts the least recently used. Not thread-safe."""

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
        """Returns a vector and marks it as the most recently used, or returns None."""
        vector = self._vectors.get(key)
        if vector is not None:
            self._vectors.move_to_end(key)
        return vector

    def put(self, key: bytes, vector: Vector) -> None:
        """Stores a vector, then evicts vectors until the limit holds."""
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
