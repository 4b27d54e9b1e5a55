"""Turns tokens into pieces of whole characters, one at a time.

The pieces depend on the tokens alone, not on how many of them an engine hands over at once: seeded
answers are cut into segments after a piece, and a resumed answer must be cut at the same places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stops import Piece

_HALF = "\N{REPLACEMENT CHARACTER}"
# Some tokenizers write a token differently at the beginning of a text, so that a few are decoded
# together with those before them.
_CONTEXT_TOKENS = 8


class Characters:
    """Holds tokens back until their text is whole."""

    def __init__(
        self, detokenize: Callable[[Sequence[int]], str], *, before: Sequence[int]
    ) -> None:
        self._detokenize = detokenize
        self._context = list(before[-_CONTEXT_TOKENS:])
        self._held: list[int] = []

    def push(self, token_id: int) -> Piece:
        """Returns the piece that is complete with this token; one without ids where none is."""
        self._held.append(token_id)
        text = self._detokenize([*self._context, *self._held])
        if text.endswith(_HALF):
            return Piece("")
        new = text[len(self._detokenize(self._context)) :]
        return self._take(new)

    def flush(self) -> Piece:
        """Returns what is left: the tokens of half a character, which has no text."""
        return self._take("")

    def _take(self, text: str) -> Piece:
        piece = Piece(text, tuple(self._held))
        self._context = [*self._context, *self._held][-_CONTEXT_TOKENS:]
        self._held = []
        return piece
