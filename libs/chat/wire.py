"""Requests for answers, from their protos."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headrace.inference.v1 import inference_pb2

from libs.chat.request import (
    MAX_MESSAGES,
    NOT_SUPPORTED,
    GenerationRequest,
    Message,
    Violations,
)

_ROLES: Mapping[int, str] = {
    inference_pb2.ROLE_SYSTEM: "system",
    inference_pb2.ROLE_DEVELOPER: "developer",
    inference_pb2.ROLE_USER: "user",
    inference_pb2.ROLE_ASSISTANT: "assistant",
    inference_pb2.ROLE_TOOL: "tool",
}
# Of all messages together. They are counted before any is read: a request of 4 MiB can have two
# million empty ones, which would take seconds.
MAX_PARTS = 4096
# Fields that no backend supports yet, and which values of them change nothing.
_NOT_SUPPORTED: Mapping[str, Callable[[Any], bool]] = {
    "frequency_penalty": lambda _value: False,
    "presence_penalty": lambda _value: False,
    "logit_bias": lambda _value: False,
    "n": lambda value: value == 1,
    "logprobs": lambda _value: False,
    "top_logprobs": lambda _value: False,
    "tools": lambda _value: False,
    "tool_choice": lambda _value: False,
    "parallel_tool_calls": lambda _value: False,
    "response_format": lambda value: value.WhichOneof("format") in (None, "text"),
}


def generation_request(request: inference_pb2.GenerateRequest) -> GenerationRequest:
    """Returns what a request asks for, with the defaults of the fields that are not set."""
    messages, refused = read_messages(request.messages)
    for field, value in request.ListFields():
        if field.name in _NOT_SUPPORTED and not _NOT_SUPPORTED[field.name](value):
            refused.append((field.name, NOT_SUPPORTED))
    return GenerationRequest(
        request_id=request.request_id,
        model=request.model,
        messages=messages,
        max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
        temperature=request.temperature if request.HasField("temperature") else 0.0,
        top_p=request.top_p if request.HasField("top_p") else 1.0,
        seed=request.seed if request.HasField("seed") else None,
        stop=tuple(request.stop),
        priority=request.priority,
        resume_from=request.resume_from,
        refused=tuple(refused),
    )


def count_request(request: inference_pb2.CountTokensRequest) -> GenerationRequest:
    """Returns the request whose prompt is counted."""
    messages, refused = read_messages(request.messages)
    return GenerationRequest(model=request.model, messages=messages, refused=tuple(refused))


def read_messages(
    given: Sequence[inference_pb2.Message],
) -> tuple[tuple[Message, ...], Violations]:
    """Returns the messages of a conversation, and what of them cannot be read."""
    refused: Violations = []
    if len(given) > MAX_MESSAGES:
        return (), refused  # which says how many messages there may be
    if sum(len(message.parts) for message in given) > MAX_PARTS:
        return (), [("messages", f"must have at most {MAX_PARTS} parts in all")]
    messages = tuple(
        Message(_ROLES.get(message.role, ""), _content(index, message.parts, refused))
        for index, message in enumerate(given)
    )
    return messages, refused


def _content(index: int, parts: Sequence[inference_pb2.Part], refused: Violations) -> str:
    """Returns the texts of a message, concatenated."""
    if len(parts) == 1 and parts[0].HasField("text"):  # nearly always
        return parts[0].text
    if not parts:
        refused.append((f"messages[{index}].parts", "must have at least one part"))
    for number, part in enumerate(parts):
        kind = part.WhichOneof("content")
        path = f"messages[{index}].parts[{number}]"
        if kind is None:
            refused.append((path, "must have a text"))
        elif kind != "text":
            refused.append((f"{path}.{kind}", NOT_SUPPORTED))
    return "".join(part.text for part in parts)


def text_message(role: inference_pb2.Role.ValueType, text: str) -> inference_pb2.Message:
    """Returns a message of one text."""
    return inference_pb2.Message(role=role, parts=[inference_pb2.Part(text=text)])
