"""Reads the logs of the processes by time, also while they grow and rotate."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from deploy.errors import CliError
from deploy.local.layout import Layout
from deploy.local.log_lines import LogLine, parse

FOLLOW_PAUSE_SECONDS = 0.2
_START = datetime.min.replace(tzinfo=UTC)


def read_logs(
    layout: Layout, *, process: str | None, follow: bool, line_count: int
) -> Iterator[LogLine]:
    """Yields the latest lines of one log or of all by time, then new ones if `follow`.

    Raises:
        CliError: the process has no log, or no mesh was started here.
    """
    paths = _logs(layout, process)
    if not paths:
        names = ", ".join(path.stem for path in _logs(layout, None))
        raise CliError(
            f"{process} has no log; there are logs of: {names}"
            if names
            else f"no mesh was started in {layout.home}; `headrace up` starts one"
        )
    followed = {path: FollowedLog(path) for path in paths}
    lines = [
        line for path in paths for line in _in_order(path.stem, tail(path, line_count).splitlines())
    ]
    yield from _by_time(lines)[max(0, len(lines) - line_count) :]
    while follow:
        time.sleep(FOLLOW_PAUSE_SECONDS)
        for path in _logs(layout, process):  # one may have been started since
            followed.setdefault(path, FollowedLog(path, from_start=True))
        yield from _by_time(
            line
            for log in followed.values()
            for line in _in_order(log.path.stem, log.read_new().splitlines())
        )


def tail(log: Path, lines: int) -> str:
    """Returns the last lines of a log, or an empty string if the file does not exist."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


class FollowedLog:
    """A log that is read from where it ended when this was created, or from its start."""

    def __init__(self, path: Path, *, from_start: bool = False) -> None:
        self.path = path
        self._offset = 0 if from_start else path.stat().st_size
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


def _logs(layout: Layout, process: str | None) -> list[Path]:
    paths = sorted(layout.logs.glob("*.log")) if layout.logs.is_dir() else []
    return [path for path in paths if process in (None, path.stem)]


def _in_order(process: str, lines: Iterable[str]) -> list[tuple[datetime, LogLine]]:
    """Returns lines with the times to sort by: of the line before, where one has none."""
    now = datetime.now(UTC)
    latest, found = _START, []
    for raw in lines:
        line = parse(process, raw, now=now)
        latest = max(latest, line.time or latest)
        found.append((latest, line))
    return found


def _by_time(lines: Iterable[tuple[datetime, LogLine]]) -> list[LogLine]:
    return [line for _, line in sorted(lines, key=lambda pair: pair[0])]
