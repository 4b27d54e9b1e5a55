"""What the inference service counts."""

from __future__ import annotations

from headrace.common.v1 import model_pb2
from prometheus_client import Counter, Gauge

BACKEND_FAILURES = Counter(
    "headrace_inference_backend_failures", "Attempts that a backend failed.", ["model", "backend"]
)
RESUMED_STREAMS = Counter(
    "headrace_inference_resumed_streams", "Streams that went on at another backend.", ["model"]
)
FALLBACKS = Counter(
    "headrace_inference_fallbacks",
    "Requests that another deployment of the model took, since the backends of the first failed.",
    ["model"],
)
LIVE_STREAMS = Gauge("headrace_inference_live_streams", "Answers that are being generated.")
TOKENS = Counter(
    "headrace_inference_tokens", "Tokens by kind: prompt, cached, completion.", ["model", "kind"]
)
PROVIDER_ANSWERS_WITHOUT_USAGE = Counter(
    "headrace_inference_provider_answers_without_usage",
    "Answers whose tokens were counted as chunks, since the provider told no usage.",
    ["provider"],
)
UNKNOWN_BACKENDS = Gauge(
    "headrace_inference_unknown_backends",
    "Backends in the routes that are skipped because this service does not know their kind.",
)
BREAKER_STATE = Gauge(
    "headrace_inference_breaker_state",
    "The circuit breaker of a model at an address: 0 closed, 1 half-open, 2 open.",
    ["address", "model"],
)
HEDGED_REQUESTS = Counter(
    "headrace_inference_hedged_requests",
    "Requests that a second backend was asked for, by which of them was first.",
    ["model", "first"],
)

_token_counters: dict[str, tuple[Counter, Counter, Counter]] = {}


def count_tokens(model: str, usage: model_pb2.TokenUsage) -> None:
    """Counts what a request used, with counters that are looked up once a model.

    Args:
        model: the public name, of a model that exists: names that clients make up have no end.
        usage: its tokens.
    """
    counters = _token_counters.get(model)
    if counters is None:
        prompt, cached, completion = (
            TOKENS.labels(model, kind) for kind in ("prompt", "cached", "completion")
        )
        counters = _token_counters[model] = (prompt, cached, completion)
    for counter, tokens in zip(
        counters, (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens), strict=True
    ):
        if tokens:
            counter.inc(tokens)
