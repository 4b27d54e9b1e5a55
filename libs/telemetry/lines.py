"""Lines on their way to a file: those of one turn of the event loop leave in one write."""

from __future__ import annotations

import asyncio
import atexit
from contextlib import suppress
from typing import BinaryIO


class LineWriter:
    """A logger of structlog's that writes lines; outside an event loop each at once.

    Under load many requests end in the same turn, and a write wakes whoever reads the log. A
    process that is killed loses the lines of the turn that it was in.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lines: list[bytes] = []
        self._asked: object = None
        atexit.register(self.flush)

    def msg(self, line: bytes) -> None:
        """Writes a line, soon."""
        self._lines.append(line)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
            return
        if len(self._lines) == 1 or self._asked is not loop:
            self._asked = loop
            loop.call_soon(self.flush)

    def flush(self) -> None:
        """Writes what waits."""
        lines, self._lines = self._lines, []
        if lines:
            # Nobody reads them any more: telling that would be one line more for nobody.
            with suppress(BrokenPipeError):
                self._file.write(b"\n".join([*lines, b""]))
                self._file.flush()

    debug = info = warning = error = critical = msg
