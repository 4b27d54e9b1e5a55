"""Writes log lines to a file: one write for all lines of one iteration of the event loop.

Writing never raises. While writes fail (a full disk, a closed pipe), lines wait in a bounded
buffer, writes are retried with increasing pauses, and lines beyond the limit are counted.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections import deque
from typing import Protocol

from prometheus_client import Counter

from libs.clock import Clock, SystemClock

WRITE_ERRORS = Counter("headrace_log_write_errors", "Writes of log lines that failed.")
LOST_LINES = Counter("headrace_log_lines_lost", "Log lines dropped because they cannot be written.")

# Lines that wait while writes fail; beyond this limit, the oldest are dropped.
MAX_WAITING_BYTES = 1024 * 1024
FIRST_RETRY_SECONDS = 0.1
MAX_RETRY_SECONDS = 5.0

_NEWLINE = ord("\n")


class RawFile(Protocol):
    """An unbuffered file, such as `io.FileIO`, whose writes may be partial."""

    def write(self, data: bytes, /) -> int | None:
        """Writes some of the data; returns the number of bytes, or None if it would block."""


class LineWriter:
    """A logger for structlog that writes lines; outside an event loop it writes each immediately.

    Under load many requests end in the same iteration, and each write wakes the log's reader. A
    killed process loses the lines of its current iteration.
    """

    def __init__(self, file: RawFile, clock: Clock | None = None) -> None:
        self._file = file
        self._clock = clock or SystemClock()
        # Reentrant: a finalizer may log while this thread holds it.
        self._lock = threading.RLock()
        self._lines: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._writing = False
        self._mid_line = False  # whether the file has the start of the first waiting line
        self._scheduled_on: asyncio.AbstractEventLoop | None = None
        self._retry_seconds = 0.0  # the current pause; 0 while writes succeed
        self._retry_at_seconds = 0.0
        atexit.register(self.close)

    def msg(self, line: bytes) -> None:
        """Writes a line now or, in an event loop, at the end of this iteration."""
        with self._lock:
            self._lines.append(line)
            self._waiting_bytes += len(line)
            self._drop_oldest()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
            return
        if self._scheduled_on is not loop:
            self._scheduled_on = loop
            loop.call_soon(self._flush_in_loop)

    def flush(self) -> None:
        """Writes the waiting lines, unless a retry is pending."""
        with self._lock:
            if (
                self._writing
            ):  # called by a finalizer during the write below, which includes its line
                return
            if self._clock.monotonic_seconds() >= self._retry_at_seconds:
                self._try_to_write()

    def close(self) -> None:
        """Tries to write the waiting lines a last time."""
        with self._lock:
            self._retry_at_seconds = 0.0
            self.flush()
            LOST_LINES.inc(len(self._lines))
            self._lines.clear()
            self._waiting_bytes = 0

    def _flush_in_loop(self) -> None:
        self._scheduled_on = None
        self.flush()
        if self._retry_seconds:
            self._scheduled_on = loop = asyncio.get_running_loop()
            loop.call_later(self._retry_seconds, self._flush_in_loop)

    def _try_to_write(self) -> None:
        self._writing = True
        try:
            while self._lines:
                self._write(b"\n".join([*self._take_all(), b""]))
        except (OSError, ValueError):  # ValueError: the file is closed
            # Not logged, because that line would have to be written, too.
            WRITE_ERRORS.inc()
            pause = max(2 * self._retry_seconds, FIRST_RETRY_SECONDS)
            self._retry_seconds = min(pause, MAX_RETRY_SECONDS)
            self._retry_at_seconds = self._clock.monotonic_seconds() + self._retry_seconds
            self._drop_oldest()
        else:
            if self._retry_seconds:
                self._retry_seconds = 0.0
                self._scheduled_on = None  # lines do not wait for the timer of the next try
        finally:
            self._writing = False

    def _take_all(self) -> list[bytes]:
        lines = list(self._lines)
        self._lines.clear()
        self._waiting_bytes = 0
        return lines

    def _write(self, data: bytes) -> None:
        """Writes lines; after an error, the lines that were not written wait again."""
        try:
            while data:
                count = self._file.write(data)
                if count is None:
                    raise BlockingIOError("the pipe is full")
                if count:
                    self._mid_line = data[count - 1] != _NEWLINE
                data = data[count:]
        finally:
            if data:
                lines = data.removesuffix(b"\n").split(b"\n")
                self._lines.extendleft(reversed(lines))
                self._waiting_bytes += sum(map(len, lines))

    def _drop_oldest(self) -> None:
        """Drops lines beyond the limit while writes fail; a partly written line stays."""
        if not self._retry_seconds:
            return
        kept = 1 if self._mid_line else 0
        while self._waiting_bytes > MAX_WAITING_BYTES and len(self._lines) > kept:
            self._waiting_bytes -= len(self._lines[kept])
            del self._lines[kept]
            LOST_LINES.inc()

    debug = info = warning = error = critical = msg
