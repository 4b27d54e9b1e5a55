"""API keys of providers: files that only their owner can read.

A file has the key and the prefix of the URLs that it may be sent to, as JSON: otherwise anyone who
deploys a version could send the key to a server of their own. `headrace provider key add` writes
it.

Files are read in a thread, never on the event loop: a disk or a network share can block. A key is
read again at most once per `MAX_AGE_SECONDS`, when a request needs it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from libs.clock import Clock
from libs.errors import FailedPrecondition
from libs.http_client import Url

MAX_KEY_BYTES = 8192
MAX_FILE_BYTES = 16 * 1024
# A replaced key is used, and a removed one refused, after at most this time.
MAX_AGE_SECONDS = 1.0

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PRINTABLE = re.compile(r"[\x21-\x7e]+")


class _Read(NamedTuple):
    """What a file held when it was read: a key and where it may be sent, or what is wrong."""

    key: str
    prefix: Url | None
    problem: str
    expires_seconds: float


class ApiKeys:
    """The keys in a folder, by file name."""

    def __init__(self, folder: Path, *, clock: Clock) -> None:
        self._folder = folder
        self._clock = clock
        self._known: dict[str, _Read] = {}
        self._reading: dict[str, asyncio.Task[_Read]] = {}

    async def get(self, name: str, url: Url) -> str:
        """Returns a key for requests to a URL. No error contains what a file holds.

        Raises:
            FailedPrecondition: the file is missing, can be read by others, holds no valid key, or
                the key must not be sent to this URL.
        """
        if not _NAME.fullmatch(name):
            raise _misconfigured(name, "has an invalid name")
        known = self._known.get(name)
        if known is None or known.expires_seconds <= self._clock.monotonic_seconds():
            known = await self._read_once(name)
        if known.problem:
            raise _misconfigured(name, known.problem)
        if known.prefix is None or not url.is_within(known.prefix):
            raise _misconfigured(name, "has a URL prefix that does not match the provider's URL")
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
        try:
            content = await asyncio.to_thread(_read_file, self._folder / name)
            read = _Read(*_parse(content), "", expires_seconds)
        except _KeyFileError as error:
            read = _Read("", None, str(error), expires_seconds)
        self._known[name] = read
        return read


class _KeyFileError(Exception):
    """What is wrong with a file, without what it holds."""


def _read_file(path: Path) -> str:
    """Returns what a file holds.

    Raises:
        _KeyFileError: it cannot be read, or by too many.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise _KeyFileError("is not a regular file")
            if status.st_mode & 0o077:
                raise _KeyFileError("can be read by other users: run chmod 600 on it")
            return file.read(MAX_FILE_BYTES + 1).decode("utf-8", "replace").strip()
    except OSError as error:
        raise _KeyFileError(os.strerror(error.errno or 0)) from error


def _parse(content: str) -> tuple[str, Url]:
    """Returns a key and the prefix of its URLs.

    Raises:
        _KeyFileError: the content has another form.
    """
    if not content.startswith("{"):
        raise _KeyFileError(
            "has no URL prefix: run `headrace provider key add NAME --url-prefix URL --file FILE`"
        )
    try:
        fields = json.loads(content)
        key, prefix = fields["key"], Url.parse(fields["url_prefix"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _KeyFileError("is not valid: add it again with `headrace provider key add`") from None
    # A key becomes a header: a line end in it would add another header.
    if not isinstance(key, str) or len(key) > MAX_KEY_BYTES or not _PRINTABLE.fullmatch(key):
        raise _KeyFileError("is not a valid key: it must be one line of printable ASCII")
    return key, prefix


def _misconfigured(name: str, problem: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the API key {name[:128]!r} {problem}", reason="BACKEND_MISCONFIGURED"
    )
