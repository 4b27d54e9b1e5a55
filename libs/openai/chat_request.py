"""Reads the body of `POST /v1/chat/completions`.

Types are checked here; ranges are rules of the inference service, which hold for gRPC too. A member
that is not supported is refused if it could change the response, and ignored otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from libs.openai.fields import INT64_MAX, Fields, parse_fields

# OpenAI's roles by their names here. `developer` is the newer name of `system`.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

_READ = frozenset(
    {
        "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed",
        "stop", "stream", "stream_options",
    }
)  # fmt: skip

# Bookkeeping, hints, and options of features that are refused by their own member.
_IGNORED = frozenset(
    {
        "user", "metadata", "store", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "service_tier", "parallel_tool_calls", "prediction",
        "reasoning_effort", "verbosity",
    }
)  # fmt: skip


def _is_empty(value: object) -> bool:
    return value in ([], {})


def _is_off(value: object) -> bool:
    return value is False or (value == 0 and isinstance(value, int | float))


_REFUSED: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "n": (lambda value: value == 1 and value is not True, "must be 1"),
    "logprobs": (_is_off, "log probabilities are not supported"),
    "top_logprobs": (_is_off, "log probabilities are not supported"),
    "tools": (_is_empty, "tools are not supported"),
    "functions": (_is_empty, "functions are not supported"),
    "tool_choice": (lambda value: value in ("none", "auto"), "tools are not supported"),
    "function_call": (lambda value: value in ("none", "auto"), "functions are not supported"),
    "response_format": (
        lambda value: isinstance(value, dict) and value.get("type") == "text",
        'only {"type": "text"} is supported',
    ),
    "modalities": (lambda value: value == ["text"], 'only ["text"] is supported'),
    "audio": (_is_empty, "audio is not supported"),
    "web_search_options": (lambda _value: False, "web search is not supported"),
    "logit_bias": (_is_empty, "is not supported"),
    "frequency_penalty": (_is_off, "must be 0: penalties are not supported"),
    "presence_penalty": (_is_off, "must be 0: penalties are not supported"),
}

_REFUSED_OF_MESSAGES: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "tool_calls": (_is_empty, "tools are not supported"),
    "function_call": (_is_empty, "functions are not supported"),
    "audio": (_is_empty, "audio is not supported"),
}

_KNOWN = _READ | _IGNORED | _REFUSED.keys()


@dataclass(frozen=True)
class ChatRequest:
    """A request for a chat completion. None means not set.

    Attributes:
        messages: pairs of a role (`system`, `user`, `assistant`) and a text, oldest first.
        include_usage: whether a stream ends with a chunk that has the usage.
    """

    model: str
    messages: tuple[tuple[str, str], ...]
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def parse_chat_completion(body: bytes) -> ChatRequest:
    """Reads a body.

    Raises:
        InvalidArgument: it is malformed, or asks for something that is not supported; the error
            names the member by its path.
    """
    fields = parse_fields(body)
    fields.refuse_unknown(_KNOWN)
    fields.refuse_unless(_REFUSED)
    stream = fields.boolean("stream") or False
    return ChatRequest(
        model=fields.require_text("model"),
        messages=tuple(_message(message) for message in fields.members("messages")),
        max_tokens=_max_tokens(fields),
        temperature=fields.number("temperature"),
        top_p=fields.number("top_p"),
        seed=fields.integer("seed", limit=INT64_MAX),
        stop=fields.texts("stop"),
        stream=stream,
        include_usage=_include_usage(fields, stream=stream),
    )


def _message(message: Fields) -> tuple[str, str]:
    name = message.require_text("role")
    role = _ROLES.get(name)
    if role is None:
        message.refuse("role", f"{name!r} is not one of {', '.join(_ROLES)}")
    message.refuse_unless(_REFUSED_OF_MESSAGES)
    return role, _content(message)


def _content(message: Fields) -> str:
    value = message.value("content")
    if isinstance(value, list):
        # Parts become lines, as in engines that read this format.
        return "\n".join(_part(part) for part in message.members("content"))
    if not isinstance(value, str):
        message.refuse("content", "must be a string or a list of text parts")
    return message.text("content") or ""


def _part(part: Fields) -> str:
    kind = part.require_text("type")
    if kind != "text":
        part.refuse("type", f"{kind!r} parts are not supported, only 'text'")
    text = part.text("text")
    if text is None:
        part.refuse("text", "must be set")
    return text


def _max_tokens(fields: Fields) -> int | None:
    older, newer = fields.integer("max_tokens"), fields.integer("max_completion_tokens")
    if older is not None and newer is not None:
        fields.refuse("max_tokens", "must not be set together with max_completion_tokens")
    return older if newer is None else newer


def _include_usage(fields: Fields, *, stream: bool) -> bool:
    options = fields.member("stream_options")
    if options is None:
        return False
    if not stream:
        fields.refuse("stream_options", "needs stream to be true")
    return options.boolean("include_usage") or False
