"""A deadline for each token of a stream."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from services.inference.domain import BackendFailedError


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

    `asyncio.timeout` around every read would make and cancel a timer for each token. Here a token
    only moves the deadline: the one timer looks at it when it fires, and is set again if it moved.
    """

    def __init__(self, limits: StallLimits) -> None:
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._started = False
        self._stalled = False

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # there is a running loop
        self._task = task
        self._cancelling = task.cancelling()
        self._deadline = self._loop.time() + self._limits.first_token_seconds
        self._set_timer()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        # As in `asyncio.timeout`: only a cancellation of our own becomes another error.
        ours = self._stalled and self._task.uncancel() <= self._cancelling
        if ours and kind is asyncio.CancelledError:
            raise BackendFailedError(self._story()) from error

    def progress(self) -> None:
        """A token came."""
        self._deadline = self._loop.time() + self._limits.between_tokens_seconds
        if not self._started:  # now the deadline may be earlier than the timer
            self._started = True
            self._set_timer()

    def wait(self) -> None:
        """The reader is the slow one: no token is asked for until `progress` is told again."""
        self._deadline = float("inf")

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        latest = self._loop.time() + self._limits.between_tokens_seconds
        at = min(self._deadline, latest) if self._started else self._deadline
        self._timer = self._loop.call_at(at, self._look)

    def _look(self) -> None:
        if self._loop.time() < self._deadline:
            self._set_timer()
            return
        self._stalled = True
        self._task.cancel()

    def _story(self) -> str:
        if self._started:
            return f"no token for {self._limits.between_tokens_seconds:g} s"
        return f"no first token in {self._limits.first_token_seconds:g} s"
