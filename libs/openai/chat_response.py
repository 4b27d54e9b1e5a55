"""Chat responses: a `chat.completion`, or `chat.completion.chunk`s as server-sent events."""

from __future__ import annotations

from typing import Protocol

from libs.openai.bodies import Json, Served, to_json

DONE = b"data: [DONE]\n\n"


class Usage(Protocol):
    """The tokens of a request: a message or plain data."""

    @property
    def prompt_tokens(self) -> int: ...  # noqa: D102  # as in `TokenUsage`
    @property
    def completion_tokens(self) -> int: ...  # noqa: D102  # likewise
    @property
    def cached_tokens(self) -> int: ...  # noqa: D102  # likewise


def completion_id(request_id: str) -> str:
    """Returns the `id` of the response to a request."""
    return f"chatcmpl-{request_id}"


def usage_object(usage: Usage) -> Json:
    """Returns a `usage`."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def completion_object(
    *,
    model: str,
    created_seconds: int,
    content: str,
    finish_reason: str,
    usage: Usage,
    served: Served,
) -> Json:
    """Returns a `chat.completion`."""
    return {
        "id": completion_id(served.request_id),
        "object": "chat.completion",
        "created": created_seconds,
        "model": model,
        "system_fingerprint": served.fingerprint,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content, "refusal": None},
                "logprobs": None,
                "finish_reason": finish_reason,
            }
        ],
        "usage": usage_object(usage),
        "headrace": served.to_json_object(),
    }


class ChunkWriter:
    """Writes the events of one streamed response.

    Order: `role`, `delta`…, `finish`, then `usage` if the request asked for it, then `DONE`. Events
    may be concatenated: `role() + delta(text)`. All but the delta's text is formatted once.
    """

    __slots__ = ("_after_text", "_before_text", "_head", "_tail")

    def __init__(
        self, *, model: str, created_seconds: int, request_id: str, include_usage: bool
    ) -> None:
        head = to_json(
            {
                "id": completion_id(request_id),
                "object": "chat.completion.chunk",
                "created": created_seconds,
                "model": model,
            }
        )
        # Without the closing brace: `choices` and other members follow.
        self._head = b"data: %b," % head[:-1]
        # If the request asked for usage, every chunk has the member; all but the last have null.
        self._tail = b',"usage":null' if include_usage else b""
        self._before_text = self._head + b'"choices":[{"index":0,"delta":{"content":'
        self._after_text = b'},"logprobs":null,"finish_reason":null}]' + self._tail + b"}\n\n"

    def role(self) -> bytes:
        """Returns the first event: the role."""
        return self._choice({"role": "assistant", "content": "", "refusal": None}, None) + b"}\n\n"

    def delta(self, text: str) -> bytes:
        """Returns the event of more text."""
        return self._before_text + to_json(text) + self._after_text

    def finish(self, finish_reason: str, served: Served) -> bytes:
        """Returns the event that ends the text, with what answered and what it cost."""
        extra = {
            "system_fingerprint": served.fingerprint,
            "headrace": served.to_json_object(),
        }
        return b"%b,%b\n\n" % (self._choice({}, finish_reason), to_json(extra)[1:])

    def usage(self, usage: Usage) -> bytes:
        """Returns the event with the usage, which has no choices."""
        last = {"choices": [], "usage": usage_object(usage)}
        return b"%b%b\n\n" % (self._head, to_json(last)[1:])

    def _choice(self, delta: Json, finish_reason: str | None) -> bytes:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        return b'%b"choices":[%b]%b' % (self._head, to_json(choice), self._tail)
