"""What the cache counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

SIZE_BYTES = Gauge("headrace_embedding_cache_size_bytes", "Memory of the vectors that are kept.")
LIMIT_BYTES = Gauge("headrace_embedding_cache_limit_bytes", "Memory that they may have.")
SIZE_VECTORS = Gauge("headrace_embedding_cache_size_vectors", "Vectors that are kept.")
EVICTED_VECTORS = Counter(
    "headrace_embedding_cache_evicted_vectors", "Vectors that gave way to newer ones."
)
IN_FLIGHT_TEXTS = Gauge(
    "headrace_embedding_cache_in_flight_texts", "Texts that are being computed."
)
IN_FLIGHT_LIMIT_TEXTS = Gauge(
    "headrace_embedding_cache_in_flight_limit_texts", "Texts that may be computed at a time."
)

_ANSWERED_TEXTS = Counter(
    "headrace_embedding_cache_answered_texts",
    "Texts that were asked for, by where their vector came from: the cache, a computation that "
    "another request had begun, the same request, or a computation of its own.",
    ["source"],
)
HIT_TEXTS = _ANSWERED_TEXTS.labels("cache")
JOINED_TEXTS = _ANSWERED_TEXTS.labels("joined")
REPEATED_TEXTS = _ANSWERED_TEXTS.labels("repeated")
COMPUTED_TEXTS = _ANSWERED_TEXTS.labels("computed")
