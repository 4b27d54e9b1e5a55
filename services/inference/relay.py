"""Between an engine and a reader: the first piece at once, later ones together if it lags."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from libs.errors import InvalidArgument
from services.inference.domain import Piece

# An engine that is so far ahead of its reader is not read further: HTTP/2 slows it down.
MAX_WAITING_PIECES = 256


class Sink(Protocol):
    """Where a backend puts the pieces of an answer."""

    @property
    def full(self) -> bool:
        """Whether to wait for `room` before the next piece."""

    def put(self, piece: Piece) -> None:
        """Adds a piece."""

    async def room(self) -> None:
        """Returns when another piece may be added."""


class Whole:
    """Keeps all pieces, for a caller that takes the answer whole; it is as long as a model answers.

    Attributes:
        pieces: so far.
    """

    full = False

    def __init__(self, *, on_first: Callable[[], None]) -> None:
        self.pieces: list[Piece] = []
        self._on_first = on_first

    def put(self, piece: Piece) -> None:
        """Adds a piece."""
        if not self.pieces:
            self._on_first()
        self.pieces.append(piece)

    async def room(self) -> None:
        """Returns at once."""


class Relay:
    """Holds the pieces that the reader has not taken yet.

    A reader as fast as the model gets every piece on its own. One that is slower, or a process
    that is busy, finds several waiting and gets them in one: under load a token costs less.
    """

    def __init__(self) -> None:
        self._waiting: list[Piece] = []
        self._changed = asyncio.Event()
        self._taken = asyncio.Event()
        self._closed = False

    @property
    def full(self) -> bool:
        """Whether to wait for `room` before the next piece."""
        return len(self._waiting) >= MAX_WAITING_PIECES

    def put(self, piece: Piece) -> None:
        """Adds a piece. Ask `room()` between two of them."""
        self._waiting.append(piece)
        self._changed.set()

    async def room(self) -> None:
        """Returns when another piece may be added: mostly at once."""
        while self.full:
            self._taken.clear()
            await self._taken.wait()

    def close(self) -> None:
        """Says that no more will come."""
        self._closed = True
        self._changed.set()

    async def take(self) -> Piece | None:
        """Returns all that has come since the last take, as one piece; None at the end."""
        while not self._waiting:
            if self._closed:
                return None
            self._changed.clear()
            await self._changed.wait()
        taken, self._waiting = self._waiting, []
        self._taken.set()
        return taken[0] if len(taken) == 1 else merged(taken)


class Behind:
    """Lets nothing through of the first tokens of an answer: the reader has them."""

    def __init__(self, relay: Relay, *, token_count: int) -> None:
        self._relay = relay
        self._ahead = token_count

    @property
    def full(self) -> bool:
        """Whether to wait for `room` before the next piece."""
        return self._relay.full

    def put(self, piece: Piece) -> None:
        """Adds a piece, if it is behind those tokens.

        Raises:
            InvalidArgument: they end inside of a piece: no message of the answer ended there.
        """
        if self._ahead >= piece.token_count > 0:
            self._ahead -= piece.token_count
            piece = Piece("", ending=piece.ending)
        elif self._ahead and (piece.token_count or piece.ending):
            raise InvalidArgument.of_field(
                "resume_from", "is not where a message of this answer ended"
            )
        self._relay.put(piece)

    async def room(self) -> None:
        """Returns when another piece may be added."""
        await self._relay.room()


def merged(pieces: list[Piece]) -> Piece:
    """Returns several pieces as one."""
    return Piece(
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        token_count=sum(piece.token_count for piece in pieces),
        ending=pieces[-1].ending,
    )
