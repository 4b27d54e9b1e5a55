"""The caller's deadline: how long the parts of a request may take, and the error when it passes."""

from __future__ import annotations

from libs.clock import Clock
from libs.errors import DeadlineExceeded
from libs.rpc.deadlines import DEADLINE_MARGIN_SECONDS

# The server ends a call `DEADLINE_MARGIN_SECONDS` before its caller's deadline. Work inside the
# call ends earlier, so that the error can say what the call was waiting for.
MARGIN_SECONDS = 0.040


def seconds_left(deadline_seconds: float | None, clock: Clock, *, waiting_for: str) -> float | None:
    """Returns how long a part of the request may take; None: no deadline.

    Args:
        deadline_seconds: the caller's deadline, on the clock's monotonic time; None: none.
        clock: the clock.
        waiting_for: what the error names, such as `backend`.

    Raises:
        DeadlineExceeded: no time is left.
    """
    if deadline_seconds is None:
        return None
    left = deadline_seconds - clock.monotonic_seconds()
    if left <= DEADLINE_MARGIN_SECONDS:
        raise deadline_exceeded(waiting_for)
    # Of a short deadline the margin would leave nothing.
    return max(left - MARGIN_SECONDS, (left - DEADLINE_MARGIN_SECONDS) / 2)


def deadline_exceeded(waiting_for: str) -> DeadlineExceeded:
    """Returns the error of a request whose deadline passed while it waited for this."""
    return DeadlineExceeded(
        f"the deadline passed while the request waited for a {waiting_for}",
        reason="DEADLINE_EXCEEDED",
        metadata={"waiting_for": waiting_for},
    )
