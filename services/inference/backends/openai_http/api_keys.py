"""API keys of providers: files that only their owner can read."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from libs.errors import FailedPrecondition

MAX_KEY_BYTES = 8192

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PRINTABLE = re.compile(r"[\x21-\x7e]+")


class ApiKeys:
    """The keys in a folder, by the names of their files. A key that was replaced is read again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[str, tuple[tuple[int, int, int], str]] = {}

    def get(self, name: str) -> str:
        """Returns a key. No error tells what a file holds.

        Raises:
            FailedPrecondition: there is none, others can read it, or it is no key.
        """
        if not _NAME.fullmatch(name):
            raise _misconfigured(name, "has a name that is none")
        path = self._folder / name
        try:
            status = path.stat()
            version = (status.st_mtime_ns, status.st_ino, status.st_mode)
            known = self._read.get(name)
            if known is None or known[0] != version:
                known = self._read[name] = version, _read(name, path)
        except OSError as error:
            raise _misconfigured(name, os.strerror(error.errno or 0)) from error
        return known[1]


def _read(name: str, path: Path) -> str:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise _misconfigured(name, "is no file")
        if status.st_mode & 0o077:
            raise _misconfigured(name, "can be read by other users: chmod 600 it")
        key = file.read(MAX_KEY_BYTES + 1).decode("ascii", "replace").strip()
    # What is no header value could add headers of its own.
    if len(key) > MAX_KEY_BYTES or not _PRINTABLE.fullmatch(key):
        raise _misconfigured(name, "is no key: one line of printable ASCII is")
    return key


def _misconfigured(name: str, problem: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the API key {name[:128]!r} {problem}", reason="BACKEND_MISCONFIGURED"
    )
