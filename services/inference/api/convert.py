"""Protos to domain."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from headrace.inference.v1 import inference_pb2

from libs.clock import Clock
from libs.ids import check_uuid, uuid7
from libs.rpc.identity import Context
from services.inference.domain import ChatCall, Chunk, Message


def chat_call(
    request: inference_pb2.GenerateRequest, clock: Clock, *, deadline_seconds: float | None = None
) -> ChatCall:
    """Returns the call of a request; its other fields are checked by `ChatCall.check`.

    Raises:
        InvalidArgument: `request_id` is no UUID.
    """
    return ChatCall(
        request_id=request_id(request.request_id, clock),
        model=request.model,
        turns=_turns(request.messages),
        max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
        temperature=request.temperature if request.HasField("temperature") else 0.0,
        top_p=request.top_p if request.HasField("top_p") else 1.0,
        seed=request.seed if request.HasField("seed") else None,
        stop=tuple(request.stop),
        priority=request.priority,
        resume_from=request.resume_from,
        deadline_seconds=deadline_seconds,
    )


def counted_call(
    request: inference_pb2.CountTokensRequest,
    clock: Clock,
    *,
    deadline_seconds: float | None = None,
) -> ChatCall:
    """Returns the call whose prompt is counted."""
    return ChatCall(
        request_id=uuid7(clock),
        model=request.model,
        turns=_turns(request.messages),
        deadline_seconds=deadline_seconds,
    )


def request_id(given: str, clock: Clock) -> str:
    """Returns the client's id, checked, or a new one.

    Raises:
        InvalidArgument: the client's is no UUID.
    """
    return check_uuid(given, field="request_id") if given else uuid7(clock)


def delta(piece: Chunk) -> inference_pb2.GenerateResponse:
    """Returns the message of a piece."""
    return inference_pb2.GenerateResponse(
        delta=inference_pb2.Delta(text=piece.text, token_count=piece.token_count)
    )


def deadline_seconds(context: Context, clock: Clock) -> float | None:
    """Returns when the caller gives up, on the clock's monotonic time; None: never."""
    remaining = cast("float | None", context.time_remaining())  # the stubs know no None
    return None if remaining is None else clock.monotonic_seconds() + remaining


def _turns(messages: Iterable[inference_pb2.Message]) -> tuple[Message, ...]:
    return tuple(Message(message.role, message.content) for message in messages)
