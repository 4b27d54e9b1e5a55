"""CPU time and memory of processes, from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import psutil

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pids: Iterable[int]) -> float:
    """Returns the user and system CPU seconds of processes and their children."""
    return sum(_own_cpu_seconds(pid) for pid in _with_children(pids))


def resident_bytes(pids: Iterable[int]) -> int:
    """Returns the resident memory of processes and their children."""
    return sum(psutil.Process(pid).memory_info().rss for pid in _with_children(pids))


def _with_children(pids: Iterable[int]) -> set[int]:
    roots = set(pids)
    return roots | {
        child.pid for pid in roots for child in psutil.Process(pid).children(recursive=True)
    }


def _own_cpu_seconds(pid: int) -> float:
    # The name in parentheses may have spaces, so fields are counted after it.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND
