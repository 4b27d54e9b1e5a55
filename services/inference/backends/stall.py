"""The time limit for each token of a stream."""

from __future__ import annotations

import asyncio
import weakref
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from services.inference.domain import BackendFailedError

# A stall is noticed at most this much later than its limit.
CHECK_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class StallLimits:
    """How long a backend may be silent.

    Attributes:
        first_token_seconds: from the request to the first token, connecting included.
        between_tokens_seconds: from one token to the next.
    """

    first_token_seconds: float = 60.0
    between_tokens_seconds: float = 15.0


class StallGuard:
    """Ends its block with `BackendFailedError` if `progress` is not called in time.

    `asyncio.timeout` around every read would create and cancel a timer per token, and one timer
    per guard still costs a few per cent of a request. A guard only stores its time limit; one timer
    per event loop checks all guards every `CHECK_SECONDS`.
    """

    def __init__(self, limits: StallLimits) -> None:
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._checks = _checks.get(self._loop) or _checks.setdefault(self._loop, _Checks())
        self._deadline = 0.0
        self._started = False
        self._stalled = False

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # there is a running loop
        self._task = task
        self._cancelling = task.cancelling()
        self._deadline = self._loop.time() + self._limits.first_token_seconds
        self._checks.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._checks.remove(self)
        # As in `asyncio.timeout`: only this guard's own cancellation becomes another error.
        own = self._stalled and self._task.uncancel() <= self._cancelling
        if own and kind is asyncio.CancelledError:
            raise BackendFailedError(self._message()) from error

    def progress(self) -> None:
        """Restarts the time limit: a token came."""
        self._deadline = self._loop.time() + self._limits.between_tokens_seconds
        self._started = True

    def pause(self) -> None:
        """Stops the time limit until the next `progress`: the reader, not the backend, is slow."""
        self._deadline = float("inf")

    def check(self, now_seconds: float) -> None:
        """Cancels the block if its time limit has passed."""
        if now_seconds >= self._deadline and not self._stalled:
            self._stalled = True
            self._task.cancel()

    def _message(self) -> str:
        if self._started:
            return f"no token for {self._limits.between_tokens_seconds:g} s"
        return f"no first token in {self._limits.first_token_seconds:g} s"


class _Checks:
    """The guards of one event loop, and the timer that checks them while there are any."""

    def __init__(self) -> None:
        self._guards: set[StallGuard] = set()
        self._scheduled = False

    def add(self, guard: StallGuard) -> None:
        self._guards.add(guard)
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_later(CHECK_SECONDS, self._check)

    def remove(self, guard: StallGuard) -> None:
        self._guards.discard(guard)

    def _check(self) -> None:
        loop = asyncio.get_running_loop()
        now_seconds = loop.time()
        for guard in self._guards:
            guard.check(now_seconds)
        self._scheduled = bool(self._guards)
        if self._scheduled:
            loop.call_later(CHECK_SECONDS, self._check)


_checks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Checks] = weakref.WeakKeyDictionary()
