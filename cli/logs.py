"""Prints the logs of the processes, also while they grow."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from deploy.errors import CliError
from deploy.local.layout import Layout
from deploy.local.readiness import tail

FOLLOW_PAUSE_SECONDS = 0.2


def print_logs(layout: Layout, *, process: str | None, follow: bool, line_count: int) -> None:
    """Prints the last lines of one log, or of all; with `follow`, until interrupted.

    Raises:
        CannotRun: there is no such log.
    """
    logs = sorted(layout.logs.glob("*.log")) if layout.logs.is_dir() else []
    if process is not None:
        names = ", ".join(log.stem for log in logs)
        logs = [log for log in logs if log.stem == process]
        if not logs:
            raise CliError(f"there is no log of {process}; there are: {names or 'none yet'}")
    followed = [_Followed(log, labelled=process is None) for log in logs]
    for log in followed:
        log.print_lines(tail(log.path, line_count))
    while follow:
        time.sleep(FOLLOW_PAUSE_SECONDS)
        for log in followed:
            log.print_lines(log.read_new())


class _Followed:
    """A log that was printed up to some point."""

    def __init__(self, path: Path, *, labelled: bool) -> None:
        self.path = path
        self._label = f"{path.stem}: " if labelled else ""
        self._offset = path.stat().st_size
        self._inode = path.stat().st_ino

    def read_new(self) -> str:
        """Returns the whole lines since the last time; a rotated log is read from its start."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return ""  # between the two renames of a rotation
        if status.st_ino != self._inode or status.st_size < self._offset:
            self._inode, self._offset = status.st_ino, 0
        with self.path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode(errors="replace")

    def print_lines(self, text: str) -> None:
        """Prints lines, each with the process's name where several logs are printed."""
        for line in text.splitlines():
            sys.stdout.write(f"{self._label}{line}\n")
        sys.stdout.flush()
