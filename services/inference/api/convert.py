"""Protos to the domain and back. The fields of chat requests are read by `libs.chat.wire`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from google.protobuf.duration_pb2 import Duration
from headrace.common.v1 import embedding_pb2, route_pb2, usage_pb2
from headrace.inference.v1 import inference_internal_pb2, inference_pb2

from libs.chat import wire
from libs.chat.request import GenerationRequest
from libs.chat.resume import token_prefix
from libs.clock import Clock
from libs.ids import uuid7
from libs.rpc.identity import Context
from services.inference.domain import ChatCall, Chunk, GenerationResult, Route, Started
from services.inference.tensors.codec import encode_varint
from services.inference.tensors.count_tokens import TokenCount
from services.inference.tensors.embed import Embeddings

_NANOS_PER_SECOND = 1_000_000_000
# The key of the field `values` of an embedding, which is packed.
_VALUES_KEY = b"\x0a"
_FINISH_REASONS: Mapping[str, inference_pb2.FinishReason.ValueType] = {
    "stop": inference_pb2.FINISH_REASON_STOP,
    "length": inference_pb2.FINISH_REASON_LENGTH,
    "content_filter": inference_pb2.FINISH_REASON_CONTENT_FILTER,
    "tool_calls": inference_pb2.FINISH_REASON_TOOL_CALLS,
}


def chat_call(
    request: inference_pb2.GenerateRequest, clock: Clock, *, deadline_seconds: float | None = None
) -> ChatCall:
    """Returns the call of a request, not yet checked: see `ChatCall.check`."""
    return ChatCall(
        request_id=request.request_id or uuid7(clock),
        request=wire.generation_request(request),
        deadline_seconds=deadline_seconds,
    )


def deadline_seconds(context: Context, clock: Clock) -> float | None:
    """Returns the caller's deadline, on the clock's monotonic time; None: none."""
    remaining = cast("float | None", context.time_remaining())  # the stubs omit None
    return None if remaining is None else clock.monotonic_seconds() + remaining


class DeltaWriter:
    """Makes the deltas of one answer. Each call returns the same message, with new values.

    A message that is made anew costs twice as much as one whose values are replaced.
    """

    def __init__(self, request: GenerationRequest, started: Started) -> None:
        self._response = inference_pb2.GenerateResponse()
        self._delta = self._response.delta
        self._delta.SetInParent()
        self._token_prefix = (
            token_prefix(request.fingerprint(), started.route.version)
            if started.is_resumable
            else ""
        )
        self._position = request.resumed_tokens

    def delta(self, chunk: Chunk) -> inference_pb2.GenerateResponse:
        """Returns the event of a chunk; serialise it before the next call."""
        delta = self._delta
        delta.text = chunk.text
        delta.token_count = chunk.token_count
        if self._token_prefix:
            self._position += chunk.token_count
            delta.resume_token = f"{self._token_prefix}{self._position}"
        return self._response


def started_event(started: Started) -> inference_pb2.GenerateResponse:
    """Returns the first event of an answer."""
    return inference_pb2.GenerateResponse(
        started=inference_pb2.Started(
            request_id=started.request_id,
            trace_id=started.trace_id,
            route=_route_decision(started.route),
            model_version=started.route.model_version,
            artifact_digest=started.route.artifact_digest,
        )
    )


def final_event(result: GenerationResult) -> inference_pb2.GenerateResponse:
    """Returns the last event of an answer."""
    usage = result.usage
    return inference_pb2.GenerateResponse(
        final=inference_pb2.Final(
            finish_reason=_FINISH_REASONS.get(
                result.finish_reason, inference_pb2.FINISH_REASON_OTHER
            ),
            usage=usage_pb2.TokenUsage(
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                cached_tokens=usage.cached_tokens,
            ),
            cost_nano_usd=result.cost_nano_usd,
            model_version=result.route.model_version,
            artifact_digest=result.route.artifact_digest,
            route=_route_decision(result.route),
            request_id=result.request_id,
            trace_id=result.trace_id,
            time_to_first_token=_duration(result.first_token_seconds),
            resumed_count=result.resumed_count,
            recomputed_tokens=result.recomputed_tokens,
        )
    )


def embed_response(embeddings: Embeddings) -> inference_internal_pb2.EmbedResponse:
    """Returns the response of `Embed`."""
    return inference_internal_pb2.EmbedResponse(
        embeddings=[_embedding(values, count) for values, count in embeddings.vectors],
        model_version=embeddings.route.model_version,
        artifact_digest=embeddings.route.artifact_digest,
        route=_route_decision(embeddings.route),
    )


def count_response(count: TokenCount) -> inference_pb2.CountTokensResponse:
    """Returns the response of `CountTokens`."""
    return inference_pb2.CountTokensResponse(
        prompt_tokens=count.prompt_tokens,
        model_version=count.route.model_version,
        artifact_digest=count.route.artifact_digest,
    )


def _route_decision(route: Route) -> route_pb2.RouteDecision:
    return route_pb2.RouteDecision(
        deployment=route.deployment,
        reason=route.reason,
        epoch=route.epoch,
        revision=route.revision,
    )


def _duration(seconds: float) -> Duration:
    whole, nanos = divmod(round(seconds * _NANOS_PER_SECOND), _NANOS_PER_SECOND)
    return Duration(seconds=whole, nanos=nanos)


def _embedding(values: bytes, token_count: int) -> embedding_pb2.Embedding:
    # Triton's little-endian float32 are how protobuf packs floats: no number is decoded.
    packed = _VALUES_KEY + encode_varint(len(values)) + values
    embedding = embedding_pb2.Embedding.FromString(packed)
    embedding.token_count = token_count
    return embedding
