"""Between an engine and a reader: the first piece at once, later ones together if it lags."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from libs.errors import InvalidArgument, ResourceExhausted
from services.inference.domain import Chunk

# An engine that is so far ahead of its reader is not read further: its connection slows it down.
MAX_WAITING_PIECES = 256
READER_TOO_SLOW = "READER_TOO_SLOW"


class ChunkSink(Protocol):
    """Where a backend puts the pieces of an answer."""

    @property
    def full(self) -> bool:
        """Whether to wait for `room` before the next piece."""

    def put(self, piece: Chunk) -> None:
        """Adds a piece."""

    async def room(self) -> None:
        """Returns when another piece may be added."""


class Collector:
    """Keeps all pieces, for a caller that takes the answer whole; it is as long as a model answers.

    Attributes:
        pieces: so far.
    """

    full = False

    def __init__(self, *, on_first: Callable[[], None]) -> None:
        self.pieces: list[Chunk] = []
        self._on_first = on_first

    def put(self, piece: Chunk) -> None:
        """Adds a piece."""
        if not self.pieces:
            self._on_first()
        self.pieces.append(piece)

    async def room(self) -> None:
        """Returns at once."""


@dataclass(frozen=True, kw_only=True)
class RelayLimits:
    """How a relay treats a reader that lags.

    Attributes:
        max_delay_seconds: its pieces are gathered for so long at most. 0: they are not.
        slow_reader_seconds: one that leaves the buffer full for so long ends the answer. 0: it may
            take its time.
    """

    max_delay_seconds: float = 0.020
    slow_reader_seconds: float = 60.0


class Relay:
    """Holds the pieces that the reader has not taken yet.

    A reader as fast as the model gets every piece on its own. One that is slower, or a process
    that is busy, comes back to several: these are gathered for a moment and go out as one. Under
    load a token costs less, not more.
    """

    def __init__(self, limits: RelayLimits = RelayLimits()) -> None:  # never changes
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._waiting: list[Chunk] = []
        self._changed = asyncio.Event()
        self._taken = asyncio.Event()
        self._hurry = asyncio.Event()
        self._closed = False
        self._taken_seconds = 0.0

    @property
    def full(self) -> bool:
        """Whether to wait for `room` before the next piece."""
        return len(self._waiting) >= MAX_WAITING_PIECES

    def put(self, piece: Chunk) -> None:
        """Adds a piece. Ask `room()` between two of them."""
        self._waiting.append(piece)
        self._changed.set()
        if self.full:
            self._hurry.set()

    async def room(self) -> None:
        """Returns when another piece may be added: mostly at once.

        Raises:
            ResourceExhausted: the reader is too slow (`READER_TOO_SLOW`).
        """
        if not self.full:
            return
        limit = self._limits.slow_reader_seconds
        try:
            async with asyncio.timeout(limit or None):
                while self.full:
                    self._taken.clear()
                    await self._taken.wait()
        except TimeoutError as error:
            raise ResourceExhausted(
                f"nothing was read for {limit:g} s while the model had more",
                reason=READER_TOO_SLOW,
                metadata={"limit_seconds": f"{limit:g}"},
            ) from error

    def close(self) -> None:
        """Says that no more will come."""
        self._closed = True
        self._changed.set()
        self._hurry.set()

    async def take(self) -> Chunk | None:
        """Returns all that has come since the last take, as one piece; None at the end."""
        if len(self._waiting) > 1:  # the reader was not back when the second one came
            await self._gather()
        while not self._waiting:
            if self._closed:
                return None
            self._changed.clear()
            await self._changed.wait()
        taken, self._waiting = self._waiting, []
        self._taken.set()
        self._taken_seconds = self._loop.time()
        return taken[0] if len(taken) == 1 else merged(taken)

    async def _gather(self) -> None:
        """Waits until the delay is over, the buffer is full, or no more will come."""
        at = self._taken_seconds + self._limits.max_delay_seconds
        if self._closed or self.full or at <= self._loop.time():
            return
        self._hurry.clear()
        timer = self._loop.call_at(at, self._hurry.set)
        try:
            await self._hurry.wait()
        finally:
            timer.cancel()


class SkipDelivered:
    """Lets nothing through of the first tokens of an answer: the reader has them."""

    def __init__(self, relay: Relay, *, token_count: int) -> None:
        self._relay = relay
        self._ahead = token_count

    @property
    def full(self) -> bool:
        """Whether to wait for `room` before the next piece."""
        return self._relay.full

    def put(self, piece: Chunk) -> None:
        """Adds a piece, if it is behind those tokens.

        Raises:
            InvalidArgument: they end inside of a piece: no message of the answer ended there.
        """
        if self._ahead >= piece.token_count > 0:
            self._ahead -= piece.token_count
            piece = Chunk("", ending=piece.ending)
        elif self._ahead and (piece.token_count or piece.ending):
            raise InvalidArgument.of_field(
                "resume_from", "is not where a message of this answer ended"
            )
        self._relay.put(piece)

    async def room(self) -> None:
        """Returns when another piece may be added."""
        await self._relay.room()


def merged(pieces: list[Chunk]) -> Chunk:
    """Returns several pieces as one."""
    if len(pieces) == 1:
        return pieces[0]
    return Chunk(
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        token_count=sum(piece.token_count for piece in pieces),
        ending=pieces[-1].ending,
    )
