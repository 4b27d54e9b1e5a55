"""One answer, from its request to its last piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from contract import ModelError, Request
from engine import UNKNOWN_TOKEN, Engine, Run, Sampling, Session
from segments import SegmentedRun
from stops import Piece, StopMatcher


@dataclass(frozen=True)
class Ending:
    """How an answer ended. Its counts are those of the whole answer, the resumed part included."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Cancelled(Exception):  # noqa: N818  # says what happened, as in libs.errors
    """The caller gave up."""


class Generation:
    """Generates one answer.

    The token ids of all pieces, the one that `run` returns included, are as many as the completion
    has tokens (less those resumed): nothing that the model made goes uncounted.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        *,
        send: Callable[[Piece], None],
        is_cancelled: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._request = request
        self._send = send
        self._is_cancelled = is_cancelled
        self._check_resume()
        self._resumed = [
            token_id
            for piece in request.resume
            for token_id in ([piece] if isinstance(piece, int) else engine.tokenize(piece))
        ]
        self._stops = StopMatcher(request.stop, delivered=self._delivered_text())
        self._sent_id_count = 0  # tokens whose ids went out
        self._silent: tuple[int, ...] = ()  # tokens without text, such as the end; wait for some
        self._last = Piece("")  # what a stop sequence left to say

    def run(self) -> tuple[Piece, Ending]:
        """Sends the pieces but the last, which it returns.

        Raises:
            ModelError: PROMPT_TOO_LONG, INTERNAL.
            Cancelled: `is_cancelled` said so.
        """
        self._check_size()
        prompt = self._engine.tokenize_conversation(self._request.messages)
        room = self._engine.context_tokens - len(prompt)
        if room < 1:
            raise self._too_long(len(prompt), "")
        limit = min(self._request.max_tokens, room)
        if limit <= len(self._resumed):
            return Piece(""), self._ending("length", len(prompt), made=0, cached=0)
        cache_salt = self._request.cache_salt
        with self._engine.session(cache_salt, [*prompt, *self._resumed]) as session:
            run = self._generate(session, prompt, limit)
        if not self._stops.stopped and not run.finish_reason:
            if self._is_cancelled():
                raise Cancelled
            raise ModelError("INTERNAL", "the engine ended the answer without a reason")
        reason = "stop" if self._stops.stopped else run.finish_reason
        cached = min(run.cached_tokens, len(prompt))
        return self._last_piece(run.token_count), self._ending(
            reason, len(prompt), made=run.token_count, cached=cached
        )

    def _generate(self, session: Session, prompt: Sequence[int], max_tokens: int) -> Run:
        sampling = Sampling(self._request.temperature, self._request.top_p, self._request.seed)
        if sampling.temperature and sampling.seed is not None:
            segmented = SegmentedRun(session, sampling, is_cancelled=self._is_cancelled)
            return segmented.run(
                prompt, self._resumed, max_tokens=max_tokens, on_piece=self._on_piece
            )
        return session.run(
            [*prompt, *self._resumed],
            max_tokens=max_tokens - len(self._resumed),
            sampling=sampling,
            on_piece=self._on_piece,
            is_cancelled=self._is_cancelled,
        )

    def _check_size(self) -> None:
        """Returns if the prompt may fit: reading a text of megabytes would take many seconds.

        Raises:
            ModelError: PROMPT_TOO_LONG.
        """
        size_bytes = sum(len(each["content"].encode()) for each in self._request.messages)
        least = size_bytes // self._engine.longest_token_bytes + len(self._request.messages)
        if least >= self._engine.context_tokens:
            raise self._too_long(least, "at least ")

    def _too_long(self, prompt_tokens: int, at_least: str) -> ModelError:
        context_tokens = self._engine.context_tokens
        return ModelError(
            "PROMPT_TOO_LONG",
            f"the prompt has {at_least}{prompt_tokens} tokens; the context has {context_tokens}, "
            "and the answer needs at least one",
            prompt_tokens=prompt_tokens,
            context_tokens=context_tokens,
        )

    def _check_resume(self) -> None:
        """Returns if the engine knows all ids: it would fail on others.

        Raises:
            ModelError: INVALID_FIELD.
        """
        size = self._engine.vocabulary_size
        if any(isinstance(piece, int) and piece >= size for piece in self._request.resume):
            raise ModelError(
                "INVALID_FIELD",
                f"resume.pieces: must have token ids below {size}",
                field="resume.pieces",
            )

    def _on_piece(self, piece: Piece) -> bool:
        out = self._stops.push(piece)
        out = Piece(out.text, (*self._silent, *out.token_ids))
        self._silent = ()
        if self._stops.stopped:
            self._last = out
        elif out.text:
            self._sent_id_count += len(out.token_ids)
            self._send(out)
        else:
            self._silent = out.token_ids
        return not self._stops.stopped

    def _last_piece(self, made: int) -> Piece:
        held = self._stops.flush()
        last = Piece(
            self._last.text + held.text, (*self._last.token_ids, *self._silent, *held.token_ids)
        )
        # Tokens of half a character at the end: the engine counts them and does not show them.
        hidden = made - self._sent_id_count - len(last.token_ids)
        return Piece(last.text, (*last.token_ids, *[UNKNOWN_TOKEN] * hidden))

    def _ending(self, reason: str, prompt_tokens: int, *, made: int, cached: int) -> Ending:
        return Ending(reason, prompt_tokens, len(self._resumed) + made, cached)

    def _delivered_text(self) -> str:
        """Returns the end of what was delivered, to find stop sequences across the seam."""
        longest = max(map(len, self._request.stop), default=0)
        if not longest or not self._resumed:
            return ""
        # A character has at most four tokens; halves at the cut do no harm, they match nothing.
        return self._engine.detokenize(self._resumed[-4 * longest :])
