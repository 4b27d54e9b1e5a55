"""A provider's answer, out of the bytes of server-sent events or of one JSON object.

Most events of a stream are the same but for their text. What surrounds the text of one event is
therefore kept, and an event that has the same surroundings needs no JSON parser: replacing a string
in JSON by another string changes nothing else. Any other event is parsed.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import orjson

from services.inference.domain import BackendFailedError, Chunk, Finish

MAX_EVENT_BYTES = 1024 * 1024
MAX_TOLD_LENGTH = 500

_MAX_INT32 = 2**31 - 1
_FINISH_REASONS = frozenset({"stop", "length", "content_filter"})
# Surroundings that change with every event are not learned over and over.
_MAX_LESSONS = 8
_CONTENT = re.compile(rb'"content"\s*:\s*"((?:[^"\\\x00-\x1f]|\\.)*)"')
_plain = re.compile(rb'[^"\\\x00-\x1f]*').fullmatch


class Usage(NamedTuple):
    """Tokens, as a provider tells them."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class CompletionStreamParser:
    """Reads the events of one streamed answer, however the network cuts them.

    Attributes:
        chunks: events with text so far, thoughts that are not shown included.
        usage: what the provider told; None: nothing.
        done: the answer is complete.
    """

    def __init__(self) -> None:
        self.chunks = 0
        self.usage: Usage | None = None
        self.done = False
        self._rest = b""
        self._surroundings: tuple[bytes, bytes] | None = None
        self._lessons = 0
        self._finish_reason = ""
        self._half_character = ""

    def feed(self, data: bytes) -> Chunk:
        """Returns the text of the events that are complete with these bytes.

        Raises:
            BackendFailedError: this is no stream of chat events, or one tells of an error.
        """
        buffer = self._rest + data
        if b"\r" in buffer:  # no JSON string holds a bare one
            buffer = buffer.replace(b"\r\n", b"\n")
        *events, self._rest = buffer.split(b"\n\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise BackendFailedError(f"an event has more than {MAX_EVENT_BYTES} bytes")
        texts = [text for event in events if (text := self._text(event))]
        return Chunk(self._characters("".join(texts)), (), len(texts))

    def ending(self) -> Finish:
        """Returns how the answer ended; where no usage was told, chunks are counted.

        Raises:
            BackendFailedError: the stream was cut.
        """
        if not self._finish_reason:
            raise BackendFailedError("the stream ended without a finish reason")
        return Finish(self._finish_reason, *(self.usage or Usage(0, self.chunks, 0)))

    def _text(self, event: bytes) -> str:
        if self._surroundings is not None:
            before, after = self._surroundings
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
            raise BackendFailedError("a delta's content is no text")
        self.chunks += bool(text or delta.get("reasoning_content") or delta.get("reasoning"))
        if text and not self._finish_reason and self.usage is None:
            self._learn(event, text)
        return text

    def _learn(self, event: bytes, text: str) -> None:
        """Keeps what surrounds this text, where it is plain which string of the event it is."""
        if self._lessons == _MAX_LESSONS or event.count(b'"content"') != 1:
            return
        found = _CONTENT.search(event)
        if found is not None and _string(found[1]) == text:
            self._lessons += 1
            self._surroundings = event[: found.start(1)], event[found.end(1) :]

    def _characters(self, text: str) -> str:
        """Joins a character that JSON escaped as two halves, one an event; holds a lone half."""
        if text.isascii() and not self._half_character:
            return text
        text = self._half_character + text
        self._half_character = ""
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self._half_character = text[:-1], text[-1]
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class WholeAnswer(NamedTuple):
    """An answer that was not streamed."""

    text: str
    usage: Usage | None
    ending: Finish


def whole_answer(body: bytes) -> WholeAnswer:
    """Reads an answer that was not streamed; without usage it counts as one chunk.

    Raises:
        BackendFailedError: this is no chat completion.
    """
    completion = _object(body)
    choice = _first_choice(completion)
    finish_reason = _finish_reason(choice)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else 0
    if not finish_reason or not isinstance(text, str | None):
        raise BackendFailedError("the answer is no chat completion")
    usage = _usage(completion.get("usage"))
    text = (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return WholeAnswer(text, usage, Finish(finish_reason, *(usage or Usage(0, 1, 0))))


class ProviderError(NamedTuple):
    """What an error's body tells; empty where it does not. Cut, since it may be anything."""

    message: str = ""
    code: str = ""
    param: str = ""


def told_error(body: bytes) -> ProviderError:
    """Reads an error's body: OpenAI's shape, or the flatter ones of others."""
    try:
        told = json.loads(body)
        error = told.get("error", told)
        if isinstance(error, str):
            return ProviderError(error[:MAX_TOLD_LENGTH])
        values = (error.get(field) for field in ProviderError._fields)
        return ProviderError(*(str(value or "")[:MAX_TOLD_LENGTH] for value in values))
    except (ValueError, RecursionError, AttributeError):
        return ProviderError()


def _string(raw: bytes) -> str | None:
    """Returns the text of the inside of a JSON string; None if it is no such thing."""
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
        raise BackendFailedError("the provider sends what is no JSON") from error
    if not isinstance(value, dict):
        raise BackendFailedError("the provider sends JSON that is no object")
    if value.get("error"):
        told = told_error(data)
        raise BackendFailedError(f"the provider sends an error: {told.code} {told.message}")
    return value


def _loads(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except ValueError:  # among others, half of a surrogate pair: the next event may have the other
        return json.loads(data)


def _first_choice(value: dict[str, Any]) -> dict[str, Any]:
    choices = value.get("choices") or [{}]
    choice = choices[0] if isinstance(choices, list) else None
    if not isinstance(choice, dict) or not isinstance(choice.get("delta") or {}, dict):
        raise BackendFailedError("the provider sends choices that are none")
    return choice


def _finish_reason(choice: dict[str, Any]) -> str:
    """Returns the reason as we tell it: providers have other words for `stop`, such as `eos`."""
    reason = choice.get("finish_reason")
    if not reason or not isinstance(reason, str):
        return ""
    return reason if reason in _FINISH_REASONS else "stop"


def _usage(told: Any) -> Usage | None:
    if not isinstance(told, dict):
        return None
    details = told.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else None
    prompt, completion = _count(told.get("prompt_tokens")), _count(told.get("completion_tokens"))
    if prompt is None or completion is None:
        return None
    return Usage(prompt, completion, min(cached or 0, prompt))


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= _MAX_INT32 else None
