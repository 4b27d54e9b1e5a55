"""Parses a provider's answer: the bytes of server-sent events, or one JSON object.

Most events of a stream differ only in their text. The parser therefore stores what surrounds the
text of one event; an event with the same prefix and suffix needs no JSON parser, because replacing
one string in JSON by another changes nothing else. Every other event is parsed. Fields and events
that are not known here are skipped.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import orjson

from services.inference.backends.counts import token_count
from services.inference.domain import BackendFailedError, Chunk, Finish

MAX_EVENT_BYTES = 1024 * 1024

_FINISH_REASONS = frozenset({"stop", "length", "content_filter"})
# If the surroundings change with every event, storing them is given up.
_MAX_TEMPLATES = 8
_CONTENT = re.compile(rb'"content"\s*:\s*"((?:[^"\\\x00-\x1f]|\\.)*)"')
_plain = re.compile(rb'[^"\\\x00-\x1f]*').fullmatch


class Usage(NamedTuple):
    """Numbers of tokens, as a provider reports them."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class CompletionStreamParser:
    """Parses the events of one streamed answer, however the network splits them.

    Attributes:
        chunks: events with text so far, including reasoning, which is not delivered.
        usage: as the provider reported it; None: not yet.
        done: whether the answer is complete.
    """

    def __init__(self) -> None:
        self.chunks = 0
        self.usage: Usage | None = None
        self.done = False
        self._incomplete = b""
        self._template: tuple[bytes, bytes] | None = None
        self._templates = 0
        self._finish_reason = ""
        self._high_surrogate = ""

    def feed(self, data: bytes) -> Chunk:
        """Returns the text of the events that are complete with these bytes.

        Raises:
            BackendFailedError: these are not chat events, or one of them is an error.
        """
        buffer = self._incomplete + data
        if b"\r" in buffer:  # never part of a JSON string, where it is escaped
            buffer = buffer.replace(b"\r\n", b"\n")
        *events, self._incomplete = buffer.split(b"\n\n")
        if len(self._incomplete) > MAX_EVENT_BYTES:
            raise BackendFailedError(f"an event has more than {MAX_EVENT_BYTES} bytes")
        texts = [text for event in events if (text := self._text(event))]
        return Chunk(self._characters("".join(texts)), (), len(texts))

    def finish(self) -> Finish:
        """Returns how the answer ended; without usage, each chunk counts as a token.

        Raises:
            BackendFailedError: the stream ended early.
        """
        if not self._finish_reason:
            raise BackendFailedError("the stream ended without a finish reason")
        return Finish(self._finish_reason, *(self.usage or Usage(0, self.chunks, 0)))

    def _text(self, event: bytes) -> str:
        if self._template is not None:
            before, after = self._template
            if (
                event.startswith(before)
                and event.endswith(after)
                and len(event) >= len(before) + len(after)
            ):
                text = _string(event[len(before) : len(event) - len(after)])
                if text is not None:
                    self.chunks += bool(text)
                    return text
        return self._parsed_text(event)

    def _parsed_text(self, event: bytes) -> str:
        data = b"\n".join(
            line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")
        )
        if self.done or not data:  # a comment, or a field that is not data
            return ""
        if data == b"[DONE]":
            self.done = True
            return ""
        chunk = _object(data)
        if isinstance(chunk.get("usage"), dict):
            self.usage = _usage(chunk["usage"]) or self.usage
        choice = _first_choice(chunk)
        self._finish_reason = _finish_reason(choice) or self._finish_reason
        delta = choice.get("delta") or {}
        text = delta.get("content") or ""
        if not isinstance(text, str):
            raise BackendFailedError("the content of a delta is not text")
        self.chunks += bool(text or delta.get("reasoning_content") or delta.get("reasoning"))
        if text and not self._finish_reason and self.usage is None:
            self._store_template(event, text)
        return text

    def _store_template(self, event: bytes, text: str) -> None:
        """Stores what surrounds this text, if it is certain which string of the event it is."""
        if self._templates == _MAX_TEMPLATES or event.count(b'"content"') != 1:
            return
        found = _CONTENT.search(event)
        if found is not None and _string(found[1]) == text:
            self._templates += 1
            self._template = event[: found.start(1)], event[found.end(1) :]

    def _characters(self, text: str) -> str:
        """Joins a surrogate pair that JSON escapes split between events; holds a first half."""
        if text.isascii() and not self._high_surrogate:
            return text
        text = self._high_surrogate + text
        self._high_surrogate = ""
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self._high_surrogate = text[:-1], text[-1]
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Completion(NamedTuple):
    """An answer that was not streamed."""

    text: str
    usage: Usage | None
    finish: Finish


def read_completion(body: bytes) -> Completion:
    """Reads an answer that was not streamed; without usage it counts as one token.

    Raises:
        BackendFailedError: this is not a chat completion.
    """
    completion = _object(body)
    choice = _first_choice(completion)
    finish_reason = _finish_reason(choice)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else 0
    if not finish_reason or not isinstance(text, str | None):
        raise BackendFailedError("the provider answers with JSON that is not a chat completion")
    usage = _usage(completion.get("usage"))
    text = (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Completion(text, usage, Finish(finish_reason, *(usage or Usage(0, 1, 0))))


def _string(raw: bytes) -> str | None:
    """Returns the text between the quotes of a JSON string; None if it is not one."""
    try:
        if _plain(raw):
            return raw.decode()
        text = json.loads(b'"' + raw + b'"')
    except ValueError:
        return None
    return text if isinstance(text, str) else None


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = _loads(data)
    except (ValueError, RecursionError) as error:
        raise BackendFailedError("the provider sends invalid JSON") from error
    if not isinstance(value, dict):
        raise BackendFailedError("the provider sends JSON that is not an object")
    if value.get("error"):
        # Its message may quote the request, and this text is logged.
        raise BackendFailedError("the provider reports an error in its stream")
    return value


def _loads(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except ValueError:  # perhaps half of a surrogate pair: the next event may have the other half
        return json.loads(data)


def _first_choice(value: dict[str, Any]) -> dict[str, Any]:
    choices = value.get("choices") or [{}]
    choice = choices[0] if isinstance(choices, list) else None
    if not isinstance(choice, dict) or not isinstance(choice.get("delta") or {}, dict):
        raise BackendFailedError("the provider sends invalid choices")
    return choice


def _finish_reason(choice: dict[str, Any]) -> str:
    """Returns one of the API's reasons: some providers have others for `stop`, such as `eos`."""
    reason = choice.get("finish_reason")
    if not reason or not isinstance(reason, str):
        return ""
    return reason if reason in _FINISH_REASONS else "stop"


def _usage(reported: Any) -> Usage | None:
    if not isinstance(reported, dict):
        return None
    details = reported.get("prompt_tokens_details")
    cached = token_count(details.get("cached_tokens")) if isinstance(details, dict) else None
    prompt = token_count(reported.get("prompt_tokens"))
    completion = token_count(reported.get("completion_tokens"))
    if prompt is None or completion is None:
        return None
    return Usage(prompt, completion, min(cached or 0, prompt))
