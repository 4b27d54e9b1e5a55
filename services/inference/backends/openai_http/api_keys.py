"""API keys of providers: files that only their owner can read.

Files are read in a thread, never on the event loop: a disk or a network share can block. A key is
read again at most once per `MAX_AGE_SECONDS`, when a request needs it.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from libs.clock import Clock
from libs.errors import FailedPrecondition

MAX_KEY_BYTES = 8192
# A replaced key is used, and a removed one refused, after at most this time.
MAX_AGE_SECONDS = 1.0

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PRINTABLE = re.compile(r"[\x21-\x7e]+")


class _Read(NamedTuple):
    """What a file held when it was read: a key, or else what is wrong with it."""

    key: str
    problem: str
    expires_seconds: float


class ApiKeys:
    """The keys in a folder, by file name."""

    def __init__(self, folder: Path, *, clock: Clock) -> None:
        self._folder = folder
        self._clock = clock
        self._known: dict[str, _Read] = {}
        self._reading: dict[str, asyncio.Task[_Read]] = {}

    async def get(self, name: str) -> str:
        """Returns a key. No error contains what a file holds.

        Raises:
            FailedPrecondition: the file is missing, can be read by others, or holds no valid key.
        """
        if not _NAME.fullmatch(name):
            raise _misconfigured(name, "has an invalid name")
        known = self._known.get(name)
        if known is None or known.expires_seconds <= self._clock.monotonic_seconds():
            known = await self._read_once(name)
        if known.problem:
            raise _misconfigured(name, known.problem)
        return known.key

    async def _read_once(self, name: str) -> _Read:
        """Reads a file; requests that need the same one at the same time share the read."""
        reading = self._reading.get(name)
        if reading is None:
            reading = self._reading[name] = asyncio.create_task(self._read(name))
            reading.add_done_callback(lambda _: self._reading.pop(name))
        return await asyncio.shield(reading)  # a caller that leaves does not end it for others

    async def _read(self, name: str) -> _Read:
        expires_seconds = self._clock.monotonic_seconds() + MAX_AGE_SECONDS
        key, problem = await asyncio.to_thread(_read_file, self._folder / name)
        read = self._known[name] = _Read(key, problem, expires_seconds)
        return read


def _read_file(path: Path) -> tuple[str, str]:
    """Returns a key and no problem, or no key and a problem."""
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return "", "is not a regular file"
            if status.st_mode & 0o077:
                return "", "can be read by other users: chmod 600 it"
            key = file.read(MAX_KEY_BYTES + 1).decode("ascii", "replace").strip()
    except OSError as error:
        return "", os.strerror(error.errno or 0)
    # A key becomes a header: a line end in it would add another header.
    if len(key) > MAX_KEY_BYTES or not _PRINTABLE.fullmatch(key):
        return "", "is not a valid key: it must be one line of printable ASCII"
    return key, ""


def _misconfigured(name: str, problem: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the API key {name[:128]!r} {problem}", reason="BACKEND_MISCONFIGURED"
    )
