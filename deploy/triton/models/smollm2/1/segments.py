"""Seeded sampling that can be resumed.

An engine's random numbers cannot be wound forward to where an answer was cut. So a seeded answer is
made in segments, each with a seed of its own, derived from the request's. Resuming repeats the
segment that was cut, from its beginning, and passes over what was delivered of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from engine import UNKNOWN_TOKEN, Run, Sampling
from stops import Piece

SEGMENT_TOKENS = 16


class TextEngine(Protocol):
    """What is needed of the engine."""

    def run(
        self,
        prompt: Sequence[int | str],
        *,
        max_tokens: int,
        sampling: Sampling,
        on_piece: Callable[[Piece], bool],
        is_cancelled: Callable[[], bool],
    ) -> Run:
        """Generates; see `Engine`."""

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Returns the text of some ids; halves of characters become U+FFFD."""


class SegmentedRun:
    """One seeded answer, or the rest of one."""

    def __init__(
        self, engine: TextEngine, sampling: Sampling, *, is_cancelled: Callable[[], bool]
    ) -> None:
        self._engine = engine
        self._sampling = sampling
        self._is_cancelled = is_cancelled

    def run(
        self,
        prompt: Sequence[int],
        resumed: Sequence[int],
        *,
        max_tokens: int,
        on_piece: Callable[[Piece], bool],
    ) -> Run:
        """Generates behind `resumed`; the result's counts leave that part out, as `Engine.run`'s.

        Args:
            prompt: what was asked.
            resumed: the tokens that were delivered.
            max_tokens: of the whole answer.
            on_piece: takes what is new, and returns whether to go on.

        Raises:
            ModelError: the engine failed.
        """
        number, start = self._last_boundary(resumed)
        segment = _Segment(known=resumed[start:], on_piece=on_piece)
        answer: list[int | str] = list(resumed[:start])
        done = start
        total = Run()
        while True:
            run = self._engine.run(
                [*prompt, *answer],
                max_tokens=max_tokens - done,
                sampling=replace(self._sampling, seed=self._seed(number)),
                on_piece=segment,
                is_cancelled=self._is_cancelled,
            )
            if segment.diverged:
                # Another engine made what was delivered. It stands; the rest is ours.
                answer = list(resumed)
                done = len(resumed)
            else:
                answer += segment.pieces
                done += run.token_count
            total.cached_tokens = total.cached_tokens or run.cached_tokens
            total.finish_reason = run.finish_reason
            total.token_count = max(0, done - len(resumed))
            if run.finish_reason or segment.ended or self._is_cancelled():
                return total
            number += 1
            segment = _Segment(known=(), on_piece=on_piece)

    def _seed(self, number: int) -> int:
        digest = hashlib.sha256(f"{self._sampling.seed}:{number}".encode()).digest()
        return int.from_bytes(digest[:4], "big")

    def _last_boundary(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """Returns the number of the segment that goes on behind these tokens, and where it began.

        A segment ends with the first whole character behind its sixteenth token.
        """
        number = start = 0
        while True:
            end = start + SEGMENT_TOKENS
            while end <= len(token_ids) and self._is_open(token_ids[start:end]):
                end += 1
            if end > len(token_ids):
                return number, start
            number, start = number + 1, end

    def _is_open(self, token_ids: Sequence[int]) -> bool:
        return self._engine.detokenize(token_ids).endswith("\N{REPLACEMENT CHARACTER}")


class _Segment:
    """Takes the pieces of one segment, passes over the tokens that are known, and ends it."""

    def __init__(self, *, known: Sequence[int], on_piece: Callable[[Piece], bool]) -> None:
        self.pieces: list[int | str] = []
        self.ended = False  # the caller wants no more
        self.diverged = False
        self._known = list(known)
        self._on_piece = on_piece
        self._token_count = 0

    def __call__(self, piece: Piece) -> bool:
        count = len(piece.token_ids)
        if self._known:
            if not _agree(piece.token_ids, self._known[:count]):
                self.diverged = True
                return False
            del self._known[:count]
        elif not self._on_piece(piece):
            self.ended = True
            return False
        if UNKNOWN_TOKEN in piece.token_ids:
            self.pieces.append(piece.text)
        else:
            self.pieces.extend(piece.token_ids)
        self._token_count += count
        return self._token_count < SEGMENT_TOKENS


def _agree(made: Sequence[int], known: Sequence[int]) -> bool:
    return len(made) == len(known) and all(
        token_id in (UNKNOWN_TOKEN, other) for token_id, other in zip(made, known, strict=True)
    )
