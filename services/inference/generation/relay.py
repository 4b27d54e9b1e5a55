"""The buffer between a backend and the reader of an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from libs.errors import InvalidArgument, ResourceExhausted
from services.inference.domain import Chunk

# A backend that is so far ahead of the reader is not read further: flow control slows it down.
MAX_WAITING_CHUNKS = 256
READER_TOO_SLOW = "READER_TOO_SLOW"


class Collector:
    """Collects an answer that is not streamed. Its size is limited by the model's `max_tokens`.

    Attributes:
        chunks: so far.
    """

    full = False

    def __init__(self, *, on_first: Callable[[], None]) -> None:
        self.chunks: list[Chunk] = []
        self._on_first = on_first

    def put(self, chunk: Chunk) -> None:
        """Adds a chunk."""
        if not self.chunks:
            self._on_first()
        self.chunks.append(chunk)

    async def room(self) -> None:
        """Returns immediately."""


@dataclass(frozen=True, kw_only=True)
class RelayLimits:
    """How a relay treats a reader that is slower than the backend.

    Attributes:
        max_delay_seconds: the longest time for which chunks are held back to be merged. 0: never.
        slow_reader_seconds: the answer ends when the buffer stays full for so long. 0: never.
    """

    max_delay_seconds: float = 0.020
    slow_reader_seconds: float = 60.0


class Relay:
    """Holds the chunks that the reader has not taken yet.

    A reader that keeps up gets every chunk on its own. If the reader or this process lags, several
    chunks wait: they are held for a moment and merged into one. A token costs less under load.
    """

    def __init__(self, limits: RelayLimits = RelayLimits()) -> None:  # never changes
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._waiting: list[Chunk] = []
        self._changed = asyncio.Event()
        self._taken = asyncio.Event()
        self._flush = asyncio.Event()
        self._closed = False
        self._taken_seconds = 0.0

    @property
    def full(self) -> bool:
        """Whether to wait for `room` before the next chunk."""
        return len(self._waiting) >= MAX_WAITING_CHUNKS

    def put(self, chunk: Chunk) -> None:
        """Adds a chunk. Check `full` between two of them."""
        self._waiting.append(chunk)
        self._changed.set()
        if self.full:
            self._flush.set()

    async def room(self) -> None:
        """Returns when another chunk may be added, usually immediately.

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
                f"the client read nothing for {limit:g} s while more was generated; read faster",
                reason=READER_TOO_SLOW,
                metadata={"limit_seconds": f"{limit:g}"},
            ) from error

    def wake(self) -> None:
        """Makes `take` return an empty chunk if nothing else waits."""
        if not self._waiting:
            self.put(Chunk(""))

    def close(self) -> None:
        """Ends the buffer: `take` returns None after the last chunk."""
        self._closed = True
        self._changed.set()
        self._flush.set()

    async def take(self) -> Chunk | None:
        """Returns everything since the last call, merged; None at the end."""
        if len(self._waiting) > 1:  # the reader came back after the second chunk
            await self._hold()
        while not self._waiting:
            if self._closed:
                return None
            self._changed.clear()
            await self._changed.wait()
        taken, self._waiting = self._waiting, []
        self._taken.set()
        self._taken_seconds = self._loop.time()
        return taken[0] if len(taken) == 1 else merged(taken)

    async def _hold(self) -> None:
        """Waits until the delay is over, the buffer is full, or no more chunks will come."""
        at = self._taken_seconds + self._limits.max_delay_seconds
        if self._closed or self.full or at <= self._loop.time():
            return
        self._flush.clear()
        timer = self._loop.call_at(at, self._flush.set)
        try:
            await self._flush.wait()
        finally:
            timer.cancel()


class SkipDelivered:
    """Drops the first tokens of an answer, which the client already has."""

    def __init__(self, relay: Relay, *, token_count: int) -> None:
        self._relay = relay
        self._remaining = token_count

    @property
    def full(self) -> bool:
        """Whether to wait for `room` before the next chunk."""
        return self._relay.full

    def put(self, chunk: Chunk) -> None:
        """Adds a chunk, unless the client has it.

        Raises:
            InvalidArgument: the count ends in the middle of a chunk, where no delta ended.
        """
        if self._remaining >= chunk.token_count > 0:
            self._remaining -= chunk.token_count
            if chunk.finish is None:
                return
            chunk = Chunk("", finish=chunk.finish)
        elif self._remaining and (chunk.token_count or chunk.finish):
            raise InvalidArgument.of_field(
                "resume_from", "is not a position where a delta of this answer ended"
            )
        self._relay.put(chunk)

    async def room(self) -> None:
        """Returns when another chunk may be added."""
        await self._relay.room()


def merged(chunks: list[Chunk]) -> Chunk:
    """Returns several chunks as one."""
    if len(chunks) == 1:
        return chunks[0]
    return Chunk(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        token_count=sum(chunk.token_count for chunk in chunks),
        finish=chunks[-1].finish,
    )
