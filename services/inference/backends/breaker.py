"""A circuit breaker: stops requests to a backend that fails, then lets a few of them try it.

closed ──too many failures──► open ──its time has passed──► half-open ──probes succeed──► closed
                                ▲                               │
                                └─────────a probe fails─────────┘    (it stays open for longer)

What counts as a failure is decided elsewhere: `triton.errors` and `openai_http.errors` say whose
fault an error is, and `pool.Suspects` settles what is undecided.

It is plain state: the time is an argument, and nothing happens between calls.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import IntEnum


class State(IntEnum):
    """The states; the numbers are those of the metric."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


@dataclass(frozen=True, kw_only=True)
class BreakerLimits:
    """When a breaker opens and closes.

    Attributes:
        consecutive_failures: this many failures in a row open it.
        failure_share: it opens if at least this share of the last `window_outcomes` failed.
        window_outcomes: how many outcomes the share is computed from, at least.
        open_seconds: how long it stays open at first; twice as long after each failed probe.
        max_open_seconds: the limit of that.
        max_retry_after_seconds: the limit of a wait that the backend asks for.
        probes: how many requests may try a half-open backend concurrently.
        probes_to_close: how many of them must succeed in a row to close it.
    """

    consecutive_failures: int = 5
    failure_share: float = 0.5
    window_outcomes: int = 50
    open_seconds: float = 0.5
    max_open_seconds: float = 30.0
    max_retry_after_seconds: float = 300.0
    probes: int = 2
    probes_to_close: int = 2


@dataclass(frozen=True)
class Permit:
    """The permission for one request; its outcome is reported with it.

    Attributes:
        epoch: the closed or half-open phase in which it was given.
    """

    epoch: int


class Breaker:
    """The breaker of one backend: call `permit`, then `succeeded`, `failed` or `abandoned`.

    Outcomes of permits of an earlier phase are ignored: they say nothing about the backend now.
    """

    def __init__(self, limits: BreakerLimits) -> None:
        self._limits = limits
        self._state = State.CLOSED
        self._epoch = 0
        self._outcomes: deque[bool] = deque(maxlen=limits.window_outcomes)
        self._failures_in_row = 0
        self._open_until_seconds = 0.0
        self._times_opened = 0
        self._probes_running = 0
        self._probes_succeeded = 0

    def state(self, now_seconds: float) -> State:
        """Returns the state."""
        if self._state is State.OPEN and now_seconds >= self._open_until_seconds:
            return State.HALF_OPEN
        return self._state

    def wait_seconds(self, now_seconds: float) -> float:
        """Returns how long no permit will be given; 0: one is available, or may be at any time."""
        if self._state is State.OPEN:
            return max(0.0, self._open_until_seconds - now_seconds)
        return 0.0

    def has_permit(self, now_seconds: float) -> bool:
        """Returns whether `permit` would return one."""
        if self._state is State.CLOSED:
            return True
        if self._state is State.HALF_OPEN:
            return self._probes_running < self._limits.probes
        return now_seconds >= self._open_until_seconds

    def permit(self, now_seconds: float) -> Permit | None:
        """Returns the permission for one request, or None."""
        if not self.has_permit(now_seconds):
            return None
        if self._state is State.OPEN:
            self._enter(State.HALF_OPEN)
        if self._state is State.HALF_OPEN:
            self._probes_running += 1
        return Permit(self._epoch)

    def succeeded(self, permit: Permit) -> None:
        """Records that the backend worked."""
        if permit.epoch != self._epoch:
            return
        if self._state is State.HALF_OPEN:
            self._probes_running -= 1
            self._probes_succeeded += 1
            if self._probes_succeeded >= self._limits.probes_to_close:
                self._times_opened = 0
                self._enter(State.CLOSED)
        else:
            self._failures_in_row = 0
            self._outcomes.append(True)

    def failed(self, permit: Permit, now_seconds: float, *, retry_after_seconds: float = 0) -> None:
        """Records that the backend failed, and how long it asks not to be called."""
        if permit.epoch != self._epoch:
            return
        if self._state is State.HALF_OPEN or retry_after_seconds > 0:
            self._open(now_seconds, retry_after_seconds)
            return
        self._failures_in_row += 1
        self._outcomes.append(False)
        if self._is_failing():
            self._open(now_seconds, retry_after_seconds)

    def abandoned(self, permit: Permit) -> None:
        """Records that the request ended without an outcome for the backend."""
        if permit.epoch == self._epoch and self._state is State.HALF_OPEN:
            self._probes_running -= 1

    def _is_failing(self) -> bool:
        limits = self._limits
        return self._failures_in_row >= limits.consecutive_failures or (
            len(self._outcomes) == limits.window_outcomes
            and self._outcomes.count(False) >= limits.failure_share * limits.window_outcomes
        )

    def _open(self, now_seconds: float, retry_after_seconds: float) -> None:
        limits = self._limits
        # The exponent is bounded: after a day of failures the power would overflow.
        seconds = limits.open_seconds * 2.0 ** min(self._times_opened, 32)
        self._times_opened += 1
        self._open_until_seconds = now_seconds + max(
            min(seconds, limits.max_open_seconds),
            min(retry_after_seconds, limits.max_retry_after_seconds),
        )
        self._enter(State.OPEN)

    def _enter(self, state: State) -> None:
        self._state = state
        self._epoch += 1
        self._outcomes.clear()
        self._failures_in_row = 0
        self._probes_running = 0
        self._probes_succeeded = 0
