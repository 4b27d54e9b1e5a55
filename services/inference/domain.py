"""What is asked of a chat model and what comes back, as plain data with its rules."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from libs.errors import HeadraceError, InvalidArgument, Unavailable

ROLES = frozenset({"system", "user", "assistant"})
DEFAULT_MAX_TOKENS = 256
MAX_MESSAGES = 1024
MAX_STOPS = 4
MAX_STOP_BYTES = 256
MAX_TEMPERATURE = 2.0
MAX_TEXTS = 2048
MAX_PRIORITY = 9


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatCall:
    """One request for an answer; `check()` has passed.

    Attributes:
        streamed: False: the caller takes the answer whole, so that nothing is gained by parts.
        priority: where requests wait, the highest goes first, of those with the same deadline.
        resume_from: so many tokens of the same answer came before; they are not delivered again.
        deadline_seconds: when the caller gives up, on the clock's monotonic time.
    """

    request_id: str
    model: str
    turns: tuple[Message, ...]
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    streamed: bool = True
    priority: int = 0
    resume_from: int = 0
    deadline_seconds: float | None = None

    def check(self) -> None:
        """Returns if every field is in range.

        Raises:
            InvalidArgument: some are not; it names all of them.
        """
        wrong = [
            *self._wrong_turns(),
            *self._wrong_sampling(),
            *self._wrong_stops(),
            *self._wrong_order(),
        ]
        if not self.model:
            wrong.insert(0, ("model", "must name a model"))
        if wrong:
            raise InvalidArgument.of_fields(wrong)

    def _wrong_turns(self) -> list[tuple[str, str]]:
        if not self.turns:
            return [("messages", "must have at least one message")]
        if len(self.turns) > MAX_MESSAGES:
            return [("messages", f"must have at most {MAX_MESSAGES} messages")]
        return [
            (f"messages[{index}].role", "must be system, user or assistant")
            for index, turn in enumerate(self.turns)
            if turn.role not in ROLES
        ]

    def _wrong_sampling(self) -> list[tuple[str, str]]:
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

    def _wrong_stops(self) -> list[tuple[str, str]]:
        if len(self.stop) > MAX_STOPS:
            return [("stop", f"must have at most {MAX_STOPS} entries")]
        return [
            (f"stop[{index}]", f"must have 1 to {MAX_STOP_BYTES} bytes")
            for index, text in enumerate(self.stop)
            if not 0 < len(text.encode()) <= MAX_STOP_BYTES
        ]

    def _wrong_order(self) -> list[tuple[str, str]]:
        wrong = []
        if not 0 <= self.priority <= MAX_PRIORITY:
            wrong.append(("priority", f"must be from 0 to {MAX_PRIORITY}"))
        if self.resume_from < 0:
            wrong.append(("resume_from", "must not be negative"))
        if self.resume_from and self.temperature > 0 and self.seed is None:
            wrong.append(("resume_from", "needs temperature 0 or a seed: else answers differ"))
        return wrong

    def limited_to(self, max_output_tokens: int) -> int:
        """Returns how many tokens the answer may have on a model that gives at most so many.

        Raises:
            InvalidArgument: the request asks for more.
        """
        if self.max_tokens is None:
            return min(DEFAULT_MAX_TOKENS, max_output_tokens)
        if self.max_tokens > max_output_tokens:
            raise InvalidArgument.of_field(
                "max_tokens", f"must be at most {max_output_tokens} for this model"
            )
        return self.max_tokens


@dataclass(frozen=True)
class ClientError:
    """What the caller hears of a failure that no other backend made good."""

    kind: type[HeadraceError]
    message: str
    reason: str
    retry_after_seconds: float | None = None

    def after(self, seconds: float) -> ClientError:
        """Returns it for a backend that takes nothing for so long."""
        return replace(self, retry_after_seconds=max(seconds, self.retry_after_seconds or 0.0))

    def error(self, backends: Collection[str]) -> HeadraceError:
        """Returns it as an error."""
        return self.kind(
            self.message,
            reason=self.reason,
            metadata={"backend": ",".join(sorted(backends))},
            retry_after_seconds=self.retry_after_seconds,
        )


BACKENDS_FAILED = ClientError(Unavailable, "the backends failed", "BACKEND_FAILED", 1.0)


class BackendFailedError(Exception):
    """The backend, not the request, is at fault: another one may go on where it stopped.

    Attributes:
        backends: the ids of those that failed; set by whoever leased them.
        told: what the caller hears if no other backend takes over.
        attempts: so many at the same backend are enough; None: as many as there is time for.
        retry_after_seconds: the backend asks to be left alone for so long.
        resumable: False: what it delivered cannot be continued by another backend.
    """

    def __init__(
        self,
        message: str,
        *,
        told: ClientError = BACKENDS_FAILED,
        attempts: int | None = None,
        retry_after_seconds: float = 0.0,
        resumable: bool = True,
    ) -> None:
        super().__init__(message)
        self.backends: frozenset[str] = frozenset()
        self.told = told
        self.attempts = attempts
        self.retry_after_seconds = retry_after_seconds
        self.resumable = resumable


class DeploymentFailedError(Exception):
    """All backends of a deployment failed before anything was delivered: another one may answer.

    Attributes:
        error: what the caller hears if none does.
    """

    def __init__(self, error: HeadraceError) -> None:
        super().__init__(error.message)
        self.error = error


@dataclass(frozen=True)
class Finish:
    """What the engine says when it is done. Resumed tokens do not count as prompt."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Chunk:
    """What one message of an engine brings: text, its tokens, perhaps the end.

    Attributes:
        text: whole characters.
        token_ids: the ids behind the text.
        token_count: how many tokens the text stands for; more than there are ids where the engine
            could not tell some.
        ending: set in the last piece.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    token_count: int = 0
    ending: Finish | None = None


@dataclass
class Delivered:
    """What one answer has so far, in the form in which an engine can continue it."""

    pieces: list[int | str] = field(default_factory=list)
    token_count: int = 0
    _pending: Chunk | None = None

    def add(self, piece: Chunk) -> Chunk | None:
        """Returns what may be delivered now of a chunk and those before it, and counts it.

        An engine continues behind token ids, or behind text where ids are missing. A chunk with
        neither text nor all ids is held until text comes or the answer ends: were it counted, an
        engine that continues the answer would generate its tokens again.
        """
        if self._pending is not None:
            piece, self._pending = _joined(self._pending, piece), None
        if len(piece.token_ids) == piece.token_count:
            self.pieces.extend(piece.token_ids)
        elif piece.text:
            self.pieces.append(piece.text)
        elif piece.ending is None:
            self._pending = piece
            return None
        self.token_count += piece.token_count
        return piece


def _joined(first: Chunk, second: Chunk) -> Chunk:
    return Chunk(
        first.text + second.text,
        first.token_ids + second.token_ids,
        first.token_count + second.token_count,
        second.ending,
    )
