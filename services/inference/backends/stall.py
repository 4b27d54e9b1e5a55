"""A deadline for each token of a stream."""

from __future__ import annotations

import asyncio
import weakref
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from services.inference.domain import BackendFailedError

# How much later than its time a stall may be seen.
LOOK_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class StallLimits:
    """How long a backend may be silent.

    Attributes:
        first_token_seconds: from the request to the first token; connecting counts.
        between_tokens_seconds: from one token to the next.
    """

    first_token_seconds: float = 60.0
    between_tokens_seconds: float = 15.0


class StallGuard:
    """Ends the block it guards with `BackendFailedError` where `progress` is not told in time.

    `asyncio.timeout` around every read would make and cancel a timer for each token, and one timer
    a guard is still a few per cent of a request. A guard only says until when; one timer looks at
    all that are, every `LOOK_SECONDS`.
    """

    def __init__(self, limits: StallLimits) -> None:
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._watch = _watches.get(self._loop) or _watches.setdefault(self._loop, _Watch())
        self._deadline = 0.0
        self._started = False
        self._stalled = False

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # there is a running loop
        self._task = task
        self._cancelling = task.cancelling()
        self._deadline = self._loop.time() + self._limits.first_token_seconds
        self._watch.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watch.remove(self)
        # As in `asyncio.timeout`: only a cancellation of our own becomes another error.
        ours = self._stalled and self._task.uncancel() <= self._cancelling
        if ours and kind is asyncio.CancelledError:
            raise BackendFailedError(self._story()) from error

    def progress(self) -> None:
        """A token came."""
        self._deadline = self._loop.time() + self._limits.between_tokens_seconds
        self._started = True

    def wait(self) -> None:
        """The reader is the slow one: no token is asked for until `progress` is told again."""
        self._deadline = float("inf")

    def look(self, now_seconds: float) -> None:
        """Ends the block if its time is over."""
        if now_seconds >= self._deadline and not self._stalled:
            self._stalled = True
            self._task.cancel()

    def _story(self) -> str:
        if self._started:
            return f"no token for {self._limits.between_tokens_seconds:g} s"
        return f"no first token in {self._limits.first_token_seconds:g} s"


class _Watch:
    """The guards of one event loop."""

    def __init__(self) -> None:
        self._guards: set[StallGuard] = set()
        self._looks = False

    def add(self, guard: StallGuard) -> None:
        self._guards.add(guard)
        if not self._looks:
            self._looks = True
            asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

    def remove(self, guard: StallGuard) -> None:
        self._guards.discard(guard)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now_seconds = loop.time()
        for guard in self._guards:
            guard.look(now_seconds)
        self._looks = bool(self._guards)
        if self._looks:
            loop.call_later(LOOK_SECONDS, self._look)


_watches: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Watch] = weakref.WeakKeyDictionary()
