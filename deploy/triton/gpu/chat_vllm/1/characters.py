"""Converts tokens to pieces of complete characters, one token at a time.

The pieces depend only on the tokens, not on how many an engine returns at once: seeded answers are
divided into segments after a piece, and a resumed answer must be divided at the same positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stops import Piece

_HALF = "\N{REPLACEMENT CHARACTER}"
# Some tokenizers decode a token differently at the start of a text, so new tokens are decoded with
# a few before them.
_CONTEXT_TOKENS = 8


class Characters:
    """Buffers tokens until their characters are complete."""

    def __init__(
        self, detokenize: Callable[[Sequence[int]], str], *, before: Sequence[int]
    ) -> None:
        self._detokenize = detokenize
        self._context = list(before[-_CONTEXT_TOKENS:])
        self._held: list[int] = []

    def push(self, token_id: int) -> Piece:
        """Returns the piece that this token completes; it has no IDs if none is complete."""
        self._held.append(token_id)
        text = self._detokenize([*self._context, *self._held])
        if text.endswith(_HALF):
            return Piece("")
        new = text[len(self._detokenize(self._context)) :]
        return self._take(new)

    def flush(self) -> Piece:
        """Returns the rest: tokens of an incomplete character, without text."""
        return self._take("")

    def _take(self, text: str) -> Piece:
        piece = Piece(text, tuple(self._held))
        self._context = [*self._context, *self._held][-_CONTEXT_TOKENS:]
        self._held = []
        return piece
