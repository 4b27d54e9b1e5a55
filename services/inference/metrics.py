"""The metrics of the inference service."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from services.inference.domain import Fault, TokenUsage

BACKEND_FAILURES = Counter(
    "headrace_inference_backend_failures",
    "Requests that failed at a backend.",
    ["model", "backend"],
)
MODEL_FAILURES = Counter(
    "headrace_inference_model_failures",
    "Requests on which the model failed, such as by an exception in its code. They are also among "
    "the backend failures, and open no breaker unless another backend answers.",
    ["model", "backend"],
)
RESUMED_STREAMS = Counter(
    "headrace_inference_resumed_streams", "Answers that another backend continued.", ["model"]
)
FALLBACKS = Counter(
    "headrace_inference_fallbacks",
    "Requests that another deployment of the model answered after the first one failed.",
    ["model"],
)
LIVE_STREAMS = Gauge("headrace_inference_live_streams", "Answers being generated.")
TOKENS = Counter(
    "headrace_inference_tokens", "Tokens by kind: prompt, cached, completion.", ["model", "kind"]
)
PROVIDER_ANSWERS_WITHOUT_USAGE = Counter(
    "headrace_inference_provider_answers_without_usage",
    "Answers whose chunks were counted as tokens because the provider reported no usage.",
    ["provider"],
)
ESTIMATED_PROMPTS = Counter(
    "headrace_inference_estimated_prompts",
    "Prompts that were billed by their size: their callers left, and too many were to be counted.",
    ["model"],
)
UNKNOWN_BACKENDS = Gauge(
    "headrace_inference_unknown_backends",
    "Backends in the routes that are skipped because this service does not know their kind.",
)
BREAKER_STATE = Gauge(
    "headrace_inference_breaker_state",
    "Circuit breaker of a model at an address: 0 closed, 1 half-open, 2 open.",
    ["address", "model"],
)
HEDGED_REQUESTS = Counter(
    "headrace_inference_hedged_requests",
    "Requests that were sent to a second backend, by which of the two was first.",
    ["model", "first"],
)

_token_counters: dict[str, tuple[Counter, Counter, Counter]] = {}


def count_failure(model: str, backend: str, fault: Fault) -> None:
    """Counts a request that failed at a backend."""
    BACKEND_FAILURES.labels(model, backend).inc()
    if fault is Fault.REQUEST_OR_BACKEND:
        MODEL_FAILURES.labels(model, backend).inc()


def count_tokens(model: str, usage: TokenUsage) -> None:
    """Counts the tokens of a request. The counters of each model are looked up once.

    Args:
        model: the public name of an existing model: other names would make endless counters.
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
