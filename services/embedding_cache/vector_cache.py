"""A cache of vectors in memory, limited by bytes and shared fairly between its owners.

Each owner has an LRU list of its own. When the limit is reached, the owner that uses the most
memory loses its least recently used vector: "longest queue drop" (Suter, Lakshman, Stiliadis and
Choudhury, "Design considerations for supporting TCP with per-flow queueing", INFOCOM 1998). One
owner may use the whole cache while it is alone, and no owner that uses less than an equal share
ever loses a vector to another one.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict

from services.embedding_cache import metrics
from services.embedding_cache.domain import Vector

# Memory of one entry in CPython 3.11 without the encoded vector (key, `Vector`, dictionary slot):
# 285 to 315 bytes, depending on how full the dictionary is. A test compares it with tracemalloc.
ENTRY_OVERHEAD_BYTES = 320
# Memory of an owner without its entries: its list, its slot and its places in the heap.
OWNER_OVERHEAD_BYTES = 1280
# The heap has at most so many places for each owner, and a constant number of further ones.
_HEAP_PLACES_PER_OWNER = 4
_HEAP_PLACES = 64


class _Share:
    """The vectors of one owner, the least recently used first."""

    __slots__ = ("owner", "size_bytes", "vectors")

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.size_bytes = OWNER_OVERHEAD_BYTES
        self.vectors: OrderedDict[bytes, Vector] = OrderedDict()


class VectorCache:
    """Vectors by owner and key. Not thread-safe."""

    def __init__(self, *, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._size_bytes = 0
        self._count = 0
        self._shares: dict[str, _Share] = {}
        # Has for each share a place with its current size, and outdated ones, which are skipped.
        self._largest: list[tuple[int, int, _Share]] = []
        self._numbers = itertools.count()  # of places: shares of the same size are not compared
        metrics.LIMIT_BYTES.set(limit_bytes)

    def __len__(self) -> int:
        return self._count

    @property
    def size_bytes(self) -> int:
        """Memory of all entries, never above the limit."""
        return self._size_bytes

    def get(self, owner: str, key: bytes) -> Vector | None:
        """Returns an owner's vector and marks it as its most recently used, or returns None."""
        share = self._shares.get(owner)
        vector = share.vectors.get(key) if share is not None else None
        if share is not None and vector is not None:
            share.vectors.move_to_end(key)
        return vector

    def put(self, owner: str, key: bytes, vector: Vector) -> None:
        """Stores an owner's vector, then evicts vectors until the limit holds."""
        share = self._shares.get(owner)
        if share is None:
            share = self._shares[owner] = _Share(owner)
            self._size_bytes += OWNER_OVERHEAD_BYTES
        known = share.vectors.pop(key, None)
        if known is not None:
            self._add(share, -_entry_bytes(known), -1)
        share.vectors[key] = vector
        self._add(share, _entry_bytes(vector), 1)
        self._place(share)
        while self._size_bytes > self._limit_bytes:
            self._evict()
        metrics.SIZE_BYTES.set(self._size_bytes)
        metrics.SIZE_VECTORS.set(self._count)

    def _evict(self) -> None:
        """Evicts the least recently used vector of the owner that uses the most memory."""
        share = self._largest_share()
        _, evicted = share.vectors.popitem(last=False)
        self._add(share, -_entry_bytes(evicted), -1)
        if share.vectors:
            self._place(share)
        else:
            self._size_bytes -= OWNER_OVERHEAD_BYTES
            del self._shares[share.owner]
        metrics.EVICTED_VECTORS.inc()

    def _largest_share(self) -> _Share:
        while True:
            negative_size, _, share = self._largest[0]
            if share.vectors and share.size_bytes == -negative_size:
                return share
            heapq.heappop(self._largest)

    def _place(self, share: _Share) -> None:
        if len(self._largest) > _HEAP_PLACES + _HEAP_PLACES_PER_OWNER * len(self._shares):
            self._largest = [
                (-each.size_bytes, next(self._numbers), each) for each in self._shares.values()
            ]
            heapq.heapify(self._largest)
        else:
            heapq.heappush(self._largest, (-share.size_bytes, next(self._numbers), share))

    def _add(self, share: _Share, size_bytes: int, count: int) -> None:
        share.size_bytes += size_bytes
        self._size_bytes += size_bytes
        self._count += count


def _entry_bytes(vector: Vector) -> int:
    return len(vector.encoded) + ENTRY_OVERHEAD_BYTES
