"""What the model takes, checked; and the errors it gives."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_ROLES = ("system", "user", "assistant")
_MAX_STOPS = 16
_MAX_TEMPERATURE = 2
_SURROGATE = re.compile("[\ud800-\udfff]")


class ModelError(Exception):
    """An error for the caller: `reason` is a `headrace.common.v1.ErrorReason` without prefix."""

    def __init__(self, reason: str, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = {key: str(value) for key, value in metadata.items()}

    def to_json(self) -> str:
        """Returns the message of the Triton error."""
        return json.dumps(
            {"reason": self.reason, "message": self.message, "metadata": self.metadata}
        )


@dataclass(frozen=True)
class Request:
    """One request. With `resume`, it goes on behind what another run of it has delivered already.

    Attributes:
        operation: `generate`, or `count_tokens`, for which only the messages matter.
        max_tokens: of the whole answer, the resumed part included.
        seed: None lets the engine choose.
        resume: token ids, and text where the ids are not known.
        cache_salt: only answers with the same one share the engine's prefix cache; empty: none do.
    """

    operation: str
    messages: tuple[dict[str, str], ...]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    resume: tuple[int | str, ...]
    cache_salt: str = ""


def parse_request(raw: bytes, *, cache_salt: str = "") -> Request:
    """Reads the JSON of a request; the salt is not in it, so that callers cannot choose it.

    Raises:
        ModelError: INVALID_FIELD, with the field in the metadata.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError("INVALID_FIELD", "request: invalid JSON", field="request") from error
    _check(isinstance(body, dict), "request", "must be an object")
    operation = body.get("operation", "generate")
    _check(operation in ("generate", "count_tokens"), "operation", "is not known")
    messages = _messages(body.get("messages"))
    if operation == "count_tokens":
        return Request(operation, messages, 0, 0.0, 1.0, None, (), (), cache_salt)
    max_tokens = body.get("max_tokens")
    temperature = body.get("temperature", 0)
    top_p = body.get("top_p", 1)
    seed = body.get("seed")
    stop = body.get("stop") or []
    _check(_is_int(max_tokens) and max_tokens > 0, "max_tokens", "must be a positive integer")
    _check(
        _is_number(temperature) and 0 <= temperature <= _MAX_TEMPERATURE,
        "temperature",
        "must be in 0..2",
    )
    _check(_is_number(top_p) and 0 < top_p <= 1, "top_p", "must be above 0 and at most 1")
    _check(seed is None or _is_int(seed), "seed", "must be an integer")
    _check(
        isinstance(stop, list)
        and len(stop) <= _MAX_STOPS
        and all(_is_text(text) and text for text in stop),
        "stop",
        f"must be at most {_MAX_STOPS} strings, none empty",
    )
    return Request(
        operation,
        messages,
        max_tokens,
        float(temperature),
        float(top_p),
        seed,
        tuple(stop),
        _resume(body.get("resume")),
        cache_salt,
    )


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    _check(isinstance(value, list) and bool(value), "messages", "must be a list, not empty")
    for index, message in enumerate(value):
        field = f"messages[{index}]"
        _check(isinstance(message, dict), field, "must be an object")
        _check(message.get("role") in _ROLES, f"{field}.role", f"must be one of {_ROLES}")
        _check(_is_text(message.get("content")), f"{field}.content", "must be a Unicode string")
    return tuple({"role": each["role"], "content": each["content"]} for each in value)


def _resume(value: Any) -> tuple[int | str, ...]:
    if value is None:
        return ()
    pieces = value.get("pieces") if isinstance(value, dict) else None
    _check(isinstance(pieces, list), "resume.pieces", "must be a list")
    _check(
        all((_is_int(piece) and piece >= 0) or _is_text(piece) for piece in pieces),
        "resume.pieces",
        "must be token ids and strings",
    )
    return tuple(piece for piece in pieces if piece != "")


def _check(holds: bool, field: str, description: str) -> None:
    if not holds:
        raise ModelError("INVALID_FIELD", f"{field}: {description}", field=field)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    """Returns whether a value is a string that has a UTF-8 form: JSON can hold half a character."""
    return isinstance(value, str) and (value.isascii() or not _SURROGATE.search(value))
