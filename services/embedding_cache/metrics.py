"""Prometheus metrics of the cache."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

SIZE_BYTES = Gauge("headrace_embedding_cache_size_bytes", "Memory of the cached vectors.")
LIMIT_BYTES = Gauge("headrace_embedding_cache_limit_bytes", "Most memory for cached vectors.")
SIZE_VECTORS = Gauge("headrace_embedding_cache_size_vectors", "Cached vectors.")
EVICTED_VECTORS = Counter(
    "headrace_embedding_cache_evicted_vectors", "Vectors that were evicted to make room."
)
IN_FLIGHT_TEXTS = Gauge(
    "headrace_embedding_cache_in_flight_texts", "Texts that are being computed."
)
IN_FLIGHT_LIMIT_TEXTS = Gauge(
    "headrace_embedding_cache_in_flight_limit_texts",
    "Most texts that are computed at the same time.",
)

_ANSWERED_TEXTS = Counter(
    "headrace_embedding_cache_answered_texts",
    "Texts in requests, by the source of their vector: the cache, a computation of another request "
    "(joined), the same request (repeated), or a new computation (computed).",
    ["source"],
)
HIT_TEXTS = _ANSWERED_TEXTS.labels("cache")
JOINED_TEXTS = _ANSWERED_TEXTS.labels("joined")
REPEATED_TEXTS = _ANSWERED_TEXTS.labels("repeated")
COMPUTED_TEXTS = _ANSWERED_TEXTS.labels("computed")
