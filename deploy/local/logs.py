"""Reads the logs of the processes, also while they grow and rotate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from deploy.errors import CliError
from deploy.local.layout import Layout

FOLLOW_PAUSE_SECONDS = 0.2


def read_logs(
    layout: Layout, *, process: str | None, follow: bool, line_count: int
) -> Iterator[tuple[str, str]]:
    """Yields process and line: the last lines of one log or of all, then new ones if `follow`.

    Raises:
        CliError: the process has no log.
    """
    paths = sorted(layout.logs.glob("*.log")) if layout.logs.is_dir() else []
    if process is not None:
        names = ", ".join(path.stem for path in paths)
        paths = [path for path in paths if path.stem == process]
        if not paths:
            raise CliError(f"{process} has no log; there are logs of: {names or 'no process yet'}")
    followed = [FollowedLog(path) for path in paths]
    for log in followed:
        for line in tail(log.path, line_count).splitlines():
            yield log.path.stem, line
    while follow:
        time.sleep(FOLLOW_PAUSE_SECONDS)
        for log in followed:
            for line in log.read_new().splitlines():
                yield log.path.stem, line


def tail(log: Path, lines: int) -> str:
    """Returns the last lines of a log, or an empty string if the file does not exist."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


class FollowedLog:
    """A log that is read from where it ended when this was created."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = path.stat().st_size
        self._inode = path.stat().st_ino

    def read_new(self) -> str:
        """Returns the complete lines since the last call. A rotated log is read from its start."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return ""  # between the two renames of a rotation
        if status.st_ino != self._inode or status.st_size < self._offset:
            self._inode, self._offset = status.st_ino, 0
        with self.path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        complete = new[: new.rfind(b"\n") + 1]
        self._offset += len(complete)
        return complete.decode(errors="replace")
