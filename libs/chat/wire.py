"""Requests for answers, from their protos."""

from __future__ import annotations

from collections.abc import Iterable

from headrace.inference.v1 import inference_pb2

from libs.chat.request import GenerationRequest, Message


def generation_request(request: inference_pb2.GenerateRequest) -> GenerationRequest:
    """Returns what a request asks for, with the defaults of the fields that are not set."""
    return GenerationRequest(
        request_id=request.request_id,
        model=request.model,
        messages=messages(request.messages),
        max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
        temperature=request.temperature if request.HasField("temperature") else 0.0,
        top_p=request.top_p if request.HasField("top_p") else 1.0,
        seed=request.seed if request.HasField("seed") else None,
        stop=tuple(request.stop),
        priority=request.priority,
        resume_from=request.resume_from,
    )


def messages(given: Iterable[inference_pb2.Message]) -> tuple[Message, ...]:
    """Returns the messages of a conversation."""
    return tuple(Message(message.role, message.content) for message in given)
