"""A request for an answer, and when it is valid."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from libs.chat.resume import ResumePoint, fingerprint, parse_token
from libs.errors import InvalidArgument
from libs.ids import check_uuid

ROLES = frozenset({"system", "user", "assistant"})
LATER_ROLES = frozenset({"developer", "tool"})
NOT_SUPPORTED = "is not supported yet by this version"
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
        resume_from: a resume token; empty: from the start.
        refused: violations that were found while the request was read.
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
    resume_from: str = ""
    refused: tuple[tuple[str, str], ...] = ()

    def violations(self) -> Violations:
        """Returns every field that is wrong."""
        return [
            *self.refused,
            *_request_id_violations(self.request_id),
            *([] if self.model else [("model", "must name a model")]),
            *self._message_violations(),
            *self._sampling_violations(),
            *self._stop_violations(),
            *self._priority_violations(),
            *self._resume_violations(),
        ]

    @property
    def is_repeatable(self) -> bool:
        """Whether the same request gets the same answer, so that it can be resumed."""
        return self.temperature == 0 or self.seed is not None

    @cached_property
    def resume_point(self) -> ResumePoint | None:
        """Where the answer continues; None: at its start, or `resume_from` is invalid."""
        try:
            return parse_token(self.resume_from) if self.resume_from else None
        except ValueError:
            return None

    @property
    def resumed_tokens(self) -> int:
        """How many tokens of this answer the client already has."""
        return self.resume_point.token_count if self.resume_point else 0

    def fingerprint(self) -> int:
        """Returns what identifies the answer: a hash of all fields that decide its tokens."""
        texts = [text for each in self.messages for text in (each.role, each.content)]
        sampling = (self.temperature, self.top_p, self.seed)
        return fingerprint([self.model, *texts, *sampling, *self.stop])

    def _message_violations(self) -> Violations:
        if not 0 < len(self.messages) <= MAX_MESSAGES:
            return [("messages", f"must have 1 to {MAX_MESSAGES} messages")]
        return [
            (f"messages[{index}].role", _role_violation(message.role))
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

    def _priority_violations(self) -> Violations:
        if not 0 <= self.priority <= MAX_PRIORITY:
            return [("priority", f"must be from 0 to {MAX_PRIORITY}")]
        return []

    def _resume_violations(self) -> Violations:
        if not self.resume_from:
            return []
        if self.resume_point is None:
            return [("resume_from", "must be the resume_token of a delta, unchanged")]
        if not self.is_repeatable:
            return [("resume_from", "needs temperature 0 or a seed: else answers differ")]
        if self.resume_point.fingerprint != self.fingerprint():
            text = "is from another request: model, messages, sampling and stop must be the same"
            return [("resume_from", text)]
        return []


def _role_violation(role: str) -> str:
    return NOT_SUPPORTED if role in LATER_ROLES else "must be system, user or assistant"


def _request_id_violations(request_id: str) -> Violations:
    if not request_id:
        return []
    try:
        check_uuid(request_id, field="request_id")
    except InvalidArgument as error:
        return list(error.field_violations)
    return []
