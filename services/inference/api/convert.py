"""Protos to domain, and back."""

from __future__ import annotations

from typing import cast

from headrace.common.v1 import model_pb2
from headrace.inference.v1 import inference_pb2

from libs.chat import wire
from libs.chat.request import GenerationRequest
from libs.clock import Clock
from libs.ids import uuid7
from libs.rpc.identity import Context
from services.inference.domain import ChatCall, Chunk, GenerationResult, Route
from services.inference.tensors.codec import encode_varint
from services.inference.tensors.count_tokens import TokenCount
from services.inference.tensors.embed import Embeddings

# The key of the field `values` of an embedding, which is packed.
_VALUES_KEY = b"\x0a"


def chat_call(
    request: inference_pb2.GenerateRequest, clock: Clock, *, deadline_seconds: float | None = None
) -> ChatCall:
    """Returns the call of a request, not yet checked: see `ChatCall.check`."""
    return ChatCall(
        request_id=request.request_id or uuid7(clock),
        request=wire.generation_request(request),
        deadline_seconds=deadline_seconds,
    )


def count_request(request: inference_pb2.CountTokensRequest) -> GenerationRequest:
    """Returns the request whose prompt is counted."""
    return GenerationRequest(model=request.model, messages=wire.messages(request.messages))


def deadline_seconds(context: Context, clock: Clock) -> float | None:
    """Returns when the caller gives up, on the clock's monotonic time; None: never."""
    remaining = cast("float | None", context.time_remaining())  # the stubs omit None
    return None if remaining is None else clock.monotonic_seconds() + remaining


def delta(chunk: Chunk) -> inference_pb2.GenerateResponse:
    """Returns the event of a chunk."""
    return inference_pb2.GenerateResponse(
        delta=inference_pb2.Delta(text=chunk.text, token_count=chunk.token_count)
    )


def final(result: GenerationResult) -> inference_pb2.GenerateResponse:
    """Returns the last event of an answer."""
    usage = result.usage
    return inference_pb2.GenerateResponse(
        final=inference_pb2.Final(
            finish_reason=result.finish_reason,
            usage=model_pb2.TokenUsage(
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
            time_to_first_token_ms=round(result.first_token_seconds * 1000),
            resumed_count=result.resumed_count,
            recomputed_tokens=result.recomputed_tokens,
        )
    )


def embed_response(embeddings: Embeddings) -> inference_pb2.EmbedResponse:
    """Returns the response of `Embed`."""
    return inference_pb2.EmbedResponse(
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


def _route_decision(route: Route) -> inference_pb2.RouteDecision:
    return inference_pb2.RouteDecision(deployment=route.deployment, reason=route.reason)


def _embedding(values: bytes, token_count: int) -> inference_pb2.Embedding:
    # Triton's little-endian float32 are how protobuf packs floats: no number is decoded.
    packed = _VALUES_KEY + encode_varint(len(values)) + values
    embedding = inference_pb2.Embedding.FromString(packed)
    embedding.token_count = token_count
    return embedding
