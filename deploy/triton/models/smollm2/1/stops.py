"""Ends an answer before its stop sequences, wherever the pieces of the answer happen to be cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Piece:
    """Some whole characters and the ids of the tokens that they came from."""

    text: str
    token_ids: tuple[int, ...] = ()


@dataclass
class StopMatcher:
    """Lets pieces through, whole, as soon as none of their text can begin a stop sequence.

    Attributes:
        stops: the sequences; the answer ends before the first of them.
        delivered: text that went out before the first piece, where an answer is resumed.
        stopped: whether a sequence was found. Nothing more is to be pushed then.
    """

    stops: Sequence[str]
    delivered: str = ""
    stopped: bool = False
    _held: list[Piece] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._longest = max(map(len, self.stops), default=0)
        self._keep_tail()

    def push(self, piece: Piece) -> Piece:
        """Returns what may go out now, empty if nothing.

        Token ids that come out with a stop are those of the whole sequence, its text is cut.
        """
        self._held.append(piece)
        if not self._longest:
            return self._take(len(self._held))
        text = self.delivered + "".join(held.text for held in self._held)
        found = _first(text, self.stops, after=len(self.delivered))
        if found is not None:
            self.stopped = True
            cut = text[len(self.delivered) : max(found, len(self.delivered))]
            return Piece(cut, self._take(len(self._held)).token_ids)
        safe = len(text) - _open_end(text, self.stops)
        return self._take(self._count_before(safe))

    def flush(self) -> Piece:
        """Returns what is held: the answer has ended, no sequence can be completed."""
        return self._take(len(self._held))

    def _count_before(self, safe: int) -> int:
        end = len(self.delivered)
        for count, held in enumerate(self._held):
            end += len(held.text)
            if end > safe:
                return count
        return len(self._held)

    def _take(self, count: int) -> Piece:
        taken, self._held = self._held[:count], self._held[count:]
        piece = Piece(
            "".join(each.text for each in taken),
            tuple(token_id for each in taken for token_id in each.token_ids),
        )
        self.delivered += piece.text
        self._keep_tail()
        return piece

    def _keep_tail(self) -> None:
        self.delivered = self.delivered[-(self._longest - 1) :] if self._longest > 1 else ""


def _first(text: str, stops: Sequence[str], *, after: int) -> int | None:
    """Returns where the sequence begins that is complete first, behind `after`, or None."""
    found = [(text.find(stop, max(0, after - len(stop) + 1)), stop) for stop in stops]
    ends = [(start + len(stop), start) for start, stop in found if start >= 0]
    return min(ends)[1] if ends else None


def _open_end(text: str, stops: Sequence[str]) -> int:
    """Returns how many of the last characters may be the beginning of a sequence."""
    return max(
        (
            length
            for stop in stops
            for length in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:length])
        ),
        default=0,
    )
