"""OpenTelemetry's names for generative AI, and the histograms of the server.

Names as of 2026 (semantic conventions, "GenAI"), which no longer have `gen_ai.client.token.usage`.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import Histogram

# Attributes of spans.
OPERATION_NAME: Final = "gen_ai.operation.name"
PROVIDER_NAME: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_TOP_P: Final = "gen_ai.request.top_p"
REQUEST_SEED: Final = "gen_ai.request.seed"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
USAGE_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
USAGE_CACHE_READ_INPUT_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
ERROR_TYPE: Final = "error.type"

# Values of `gen_ai.operation.name`.
OPERATION_CHAT: Final = "chat"
OPERATION_EMBEDDINGS: Final = "embeddings"

# Metrics of the server, and of calls to providers.
SERVER_REQUEST_DURATION: Final = "gen_ai.server.request.duration"
SERVER_TIME_TO_FIRST_TOKEN: Final = "gen_ai.server.time_to_first_token"  # noqa: S105  # a metric
SERVER_TIME_PER_OUTPUT_TOKEN: Final = "gen_ai.server.time_per_output_token"  # noqa: S105  # likewise
CLIENT_DURATION: Final = "gen_ai.client.inference.duration"
CLIENT_TIME_TO_FIRST_CHUNK: Final = "gen_ai.client.inference.time_to_first_chunk"
CLIENT_TIME_PER_OUTPUT_CHUNK: Final = "gen_ai.client.inference.time_per_output_chunk"
CLIENT_USAGE_INPUT_TOKENS: Final = "gen_ai.client.inference.usage.input_tokens"
CLIENT_USAGE_OUTPUT_TOKENS: Final = "gen_ai.client.inference.usage.output_tokens"
CLIENT_USAGE_CACHE_READ_INPUT_TOKENS: Final = (
    "gen_ai.client.inference.usage.cache_read.input_tokens"
)

# The boundaries of the conventions, and smaller ones for accelerators and warm prefix caches.
REQUEST_DURATION_BUCKETS_SECONDS = (
    0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96,
    81.92, 163.84,
)  # fmt: skip
TIME_TO_FIRST_TOKEN_BUCKETS_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0,
)  # fmt: skip
TIME_PER_OUTPUT_TOKEN_BUCKETS_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4,
    0.5, 0.75, 1.0, 2.5,
)  # fmt: skip


def _prometheus(name: str) -> str:
    return name.replace(".", "_")


_MODEL_LABELS = tuple(map(_prometheus, (OPERATION_NAME, REQUEST_MODEL, RESPONSE_MODEL)))

REQUEST_DURATION = Histogram(
    _prometheus(SERVER_REQUEST_DURATION) + "_seconds",
    "Time from a request to its last byte.",
    [*_MODEL_LABELS, _prometheus(ERROR_TYPE)],
    buckets=REQUEST_DURATION_BUCKETS_SECONDS,
)
TIME_TO_FIRST_TOKEN = Histogram(
    _prometheus(SERVER_TIME_TO_FIRST_TOKEN) + "_seconds",
    "Time from a request to its first token.",
    _MODEL_LABELS,
    buckets=TIME_TO_FIRST_TOKEN_BUCKETS_SECONDS,
)
TIME_PER_OUTPUT_TOKEN = Histogram(
    _prometheus(SERVER_TIME_PER_OUTPUT_TOKEN) + "_seconds",
    "Mean time of each token after the first, of one request.",
    _MODEL_LABELS,
    buckets=TIME_PER_OUTPUT_TOKEN_BUCKETS_SECONDS,
)


class ModelMetrics:
    """The histograms of one operation on one model version, with labels looked up in advance.

    Make one for each when the version becomes known, and keep it.

    Attributes:
        time_to_first_token: observe seconds, once per stream.
        time_per_output_token: observe seconds, once per stream.
    """

    def __init__(self, *, operation: str, model: str, model_version: str) -> None:
        labels = (operation, model, model_version)
        self.time_to_first_token = TIME_TO_FIRST_TOKEN.labels(*labels)
        self.time_per_output_token = TIME_PER_OUTPUT_TOKEN.labels(*labels)
        self._labels = labels
        self._request_duration: dict[str, Histogram] = {}

    def observe_request(self, seconds: float, *, error_type: str = "") -> None:
        """Records a request that ended.

        Args:
            seconds: from the request to its last byte.
            error_type: name of an `ErrorReason`, or empty on success.
        """
        child = self._request_duration.get(error_type)
        if child is None:
            child = REQUEST_DURATION.labels(*self._labels, error_type)
            self._request_duration[error_type] = child
        child.observe(seconds)


_models: dict[tuple[str, str, str], ModelMetrics] = {}


def observe(
    *,
    model: str,
    model_version: str,
    operation: str,
    duration_seconds: float,
    first_token_seconds: float | None = None,
    output_tokens: int = 0,
    error_type: str = "",
) -> None:
    """Records one request in all three histograms.

    Args:
        model: public name of a model that exists; other names would grow without limit.
        model_version: the version that answered.
        operation: a value of `gen_ai.operation.name`.
        duration_seconds: from the request to its last byte.
        first_token_seconds: from the request to its first token, or None.
        output_tokens: number of generated tokens, including the first.
        error_type: name of an `ErrorReason`, or empty on success.
    """
    key = (operation, model, model_version)
    metrics = _models.get(key)
    if metrics is None:
        metrics = _models[key] = ModelMetrics(
            operation=operation, model=model, model_version=model_version
        )
    metrics.observe_request(duration_seconds, error_type=error_type)
    if first_token_seconds is None:
        return
    metrics.time_to_first_token.observe(first_token_seconds)
    if output_tokens > 1:
        decoding_seconds = duration_seconds - first_token_seconds
        metrics.time_per_output_token.observe(decoding_seconds / (output_tokens - 1))
