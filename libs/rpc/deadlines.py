"""Ends calls at their deadlines, with one timer of the event loop for all of them.

`asyncio.timeout` does the same with a timer for each call, which costs a unary request a quarter of
what it costs the server.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

from libs.errors import DeadlineExceeded

# A call ends this much before its deadline, so that the server can still say what timed out.
DEADLINE_MARGIN_SECONDS = 0.020


class Deadlines:
    """The deadlines of the calls that run on one event loop."""

    def __init__(self) -> None:
        self._running: set[Deadline] = set()
        self._handle: asyncio.TimerHandle | None = None
        self._next_seconds = float("inf")

    def after(self, seconds: float) -> Deadline:
        """Returns a deadline for a block, so many seconds from now."""
        return Deadline(self, seconds)

    def add(self, deadline: Deadline) -> None:
        """Watches a deadline."""
        self._running.add(deadline)
        if deadline.when_seconds < self._next_seconds:
            self._wake_at(deadline.when_seconds)

    def discard(self, deadline: Deadline) -> None:
        """Forgets a deadline. The timer stays: it finds nothing to end then."""
        self._running.discard(deadline)

    def _wake_at(self, when_seconds: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._next_seconds = when_seconds
        self._handle = asyncio.get_running_loop().call_at(when_seconds, self._wake)

    def _wake(self) -> None:
        self._handle = None
        self._next_seconds = float("inf")
        now = asyncio.get_running_loop().time()
        for deadline in [found for found in self._running if found.when_seconds <= now]:
            self._running.discard(deadline)
            deadline.expire()
        if self._running:
            self._wake_at(min(deadline.when_seconds for deadline in self._running))


class Deadline:
    """Cancels the task that runs a block when its time is over; the block then raises.

    Attributes:
        when_seconds: when that is, by the loop's clock.
    """

    __slots__ = ("_cancelling", "_deadlines", "_expired", "_task", "when_seconds")

    def __init__(self, deadlines: Deadlines, seconds: float) -> None:
        self.when_seconds = asyncio.get_running_loop().time() + seconds - DEADLINE_MARGIN_SECONDS
        self._deadlines = deadlines
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._expired = False

    def extend(self, seconds: float) -> None:
        """Moves the deadline of a running block, unless it has passed."""
        self.when_seconds += seconds

    def expire(self) -> None:
        """Cancels the block."""
        self._expired = True
        if self._task is not None:
            self._task.cancel()

    def __enter__(self) -> None:
        """Starts the block.

        Raises:
            DeadlineExceeded: the deadline has passed already.
        """
        if self.when_seconds <= asyncio.get_running_loop().time():
            raise _exceeded()
        self._task = asyncio.current_task()
        self._cancelling = 0 if self._task is None else self._task.cancelling()
        self._deadlines.add(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Ends the block.

        Raises:
            DeadlineExceeded: the deadline passed, and nothing else cancelled the task.
        """
        self._deadlines.discard(self)
        if not self._expired or self._task is None:
            return
        if self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise _exceeded() from raised


def _exceeded() -> DeadlineExceeded:
    return DeadlineExceeded(
        "the deadline passed before the work was done", reason="DEADLINE_EXCEEDED"
    )
