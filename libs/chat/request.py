"""A request for an answer, and when it is valid."""

from __future__ import annotations

from dataclasses import dataclass

from libs.errors import InvalidArgument
from libs.ids import check_uuid

ROLES = frozenset({"system", "user", "assistant"})
MAX_MESSAGES = 1024
MAX_STOPS = 4
MAX_STOP_BYTES = 256
MAX_TEMPERATURE = 2.0
MAX_PRIORITY = 9

# The path of a field and what is wrong with it.
Violations = list[tuple[str, str]]


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What a caller asks for. It may be invalid: `violations()` says so.

    Attributes:
        request_id: chosen by the client; empty: the service generates one.
        model: a model reference.
        messages: oldest first.
        max_tokens: None: a default.
        seed: None: sampling is not repeatable.
        priority: of waiting requests with the same deadline, the highest runs first.
        resume_from: how many tokens of this answer the client already has.
    """

    model: str
    messages: tuple[Message, ...]
    request_id: str = ""
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    priority: int = 0
    resume_from: int = 0

    def violations(self) -> Violations:
        """Returns every field that is wrong."""
        return [
            *_request_id_violations(self.request_id),
            *([] if self.model else [("model", "must name a model")]),
            *self._message_violations(),
            *self._sampling_violations(),
            *self._stop_violations(),
            *self._order_violations(),
        ]

    def _message_violations(self) -> Violations:
        if not 0 < len(self.messages) <= MAX_MESSAGES:
            return [("messages", f"must have 1 to {MAX_MESSAGES} messages")]
        return [
            (f"messages[{index}].role", "must be system, user or assistant")
            for index, message in enumerate(self.messages)
            if message.role not in ROLES
        ]

    def _sampling_violations(self) -> Violations:
        wrong = []
        if self.max_tokens is not None and self.max_tokens < 1:
            wrong.append(("max_tokens", "must be at least 1"))
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            wrong.append(("temperature", "must be from 0 to 2"))
        if not 0 < self.top_p <= 1:
            wrong.append(("top_p", "must be above 0 and at most 1"))
        if self.seed is not None and self.seed < 0:
            wrong.append(("seed", "must not be negative"))
        return wrong

    def _stop_violations(self) -> Violations:
        if len(self.stop) > MAX_STOPS:
            return [("stop", f"must have at most {MAX_STOPS} entries")]
        return [
            (f"stop[{index}]", f"must have 1 to {MAX_STOP_BYTES} bytes")
            for index, text in enumerate(self.stop)
            if not 0 < len(text.encode()) <= MAX_STOP_BYTES
        ]

    def _order_violations(self) -> Violations:
        wrong = []
        if not 0 <= self.priority <= MAX_PRIORITY:
            wrong.append(("priority", f"must be from 0 to {MAX_PRIORITY}"))
        if self.resume_from < 0:
            wrong.append(("resume_from", "must not be negative"))
        if self.resume_from and self.temperature > 0 and self.seed is None:
            wrong.append(("resume_from", "needs temperature 0 or a seed: else answers differ"))
        return wrong


def _request_id_violations(request_id: str) -> Violations:
    if not request_id:
        return []
    try:
        check_uuid(request_id, field="request_id")
    except InvalidArgument as error:
        return list(error.field_violations)
    return []
