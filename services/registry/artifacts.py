"""Stores artifacts by digest, completely or not at all."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import AsyncIterable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import BinaryIO, ParamSpec, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

import structlog

from libs.errors import InvalidArgument, Unavailable

_log = structlog.get_logger()

CHUNK_BYTES = 1024 * 1024
# Left free on the disk for other programs.
SPARE_BYTES = 64 * 1024 * 1024
NO_SPACE_RETRY_SECONDS = 60.0
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

T = TypeVar("T")
P = ParamSpec("P")


class ArtifactStore(Protocol):
    """Stores artifacts by digest."""

    async def put(self, digest: str, *, size_bytes: int, chunks: AsyncIterable[bytes]) -> None:
        """Stores an artifact: on disk when this returns; nothing of it when this raises.

        Raises:
            InvalidArgument: the chunks have another size or digest.
            Unavailable: there is not enough space.
        """

    def open(self, digest: str) -> BinaryIO | None:
        """Opens an artifact to read and seek in; None if it does not exist. Blocks."""


def open_store(url: str) -> FileArtifactStore:
    """Opens the store at a URL.

    Raises:
        ValueError: the URL has another form than `file:///FOLDER`.
    """
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise ValueError(f"invalid artifact URL {url!r}: must be file:///FOLDER")
    return FileArtifactStore(Path(unquote(parts.path)))


class FileArtifactStore:
    """A folder: `sha256/<hex>` has the artifacts, `incoming/` the uploads that are running."""

    def __init__(self, root: Path) -> None:
        self._stored = root / "sha256"
        self._incoming = root / "incoming"
        for folder in (self._stored, self._incoming):
            folder.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned()

    async def put(self, digest: str, *, size_bytes: int, chunks: AsyncIterable[bytes]) -> None:
        """Stores an artifact, see `ArtifactStore`. An existing one is written again."""
        incoming = await _in_thread(_Incoming, self._incoming, size_bytes)
        try:
            async for chunk in chunks:
                await _in_thread(incoming.write, chunk)
            await _in_thread(incoming.finish, self._path(digest), digest)
        finally:
            await _in_thread(incoming.discard)

    def open(self, digest: str) -> BinaryIO | None:
        """Opens an artifact; see `ArtifactStore`."""
        try:
            return self._path(digest).open("rb")
        except FileNotFoundError:
            return None

    def _path(self, digest: str) -> Path:
        return self._stored / digest.removeprefix("sha256:")

    def _remove_abandoned(self) -> None:
        """Removes what killed uploads left. A running one, also of another replica, has a lock."""
        for path in self._incoming.iterdir():
            with path.open("rb") as file, suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
                _log.info("removed abandoned upload", size_bytes=os.fstat(file.fileno()).st_size)


class _Incoming:
    """A file that becomes an artifact once it is complete and has the right digest. Blocks."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        _check_space(folder, size_bytes)
        self._file = NamedTemporaryFile(dir=folder, delete=False)  # noqa: SIM115  # discard() closes it
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._path = Path(self._file.name)
        self._hash = hashlib.sha256()
        self._size_bytes = size_bytes
        self._received_bytes = 0

    def write(self, chunk: bytes) -> None:
        """Appends the next bytes.

        Raises:
            InvalidArgument: there are more bytes than announced.
            Unavailable: there is no space left.
        """
        self._received_bytes += len(chunk)
        if self._received_bytes > self._size_bytes:
            raise InvalidArgument.of_field(
                "metadata.size_bytes", f"is {self._size_bytes}, but more bytes were sent"
            )
        self._hash.update(chunk)
        with _space_errors():
            self._file.write(chunk)

    def finish(self, path: Path, digest: str) -> None:
        """Checks the file, writes it to disk and moves it to its path.

        Raises:
            InvalidArgument: bytes are missing, or the digest is another one.
            Unavailable: there is no space left.
        """
        if self._received_bytes != self._size_bytes:
            raise InvalidArgument.of_field(
                "metadata.size_bytes",
                f"is {self._size_bytes}, but {self._received_bytes} bytes were sent",
            )
        actual = f"sha256:{self._hash.hexdigest()}"
        if actual != digest:
            raise InvalidArgument(
                f"the bytes have the digest {actual}, not {digest}",
                reason="DIGEST_MISMATCH",
                metadata={"expected_digest": digest, "actual_digest": actual},
                field_violations=[("metadata.digest", f"the bytes have {actual}")],
            )
        with _space_errors():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._path.chmod(0o444)
            self._path.replace(path)
            _sync_folder(path.parent)

    def discard(self) -> None:
        """Closes the file, and removes it unless it was finished."""
        with suppress(OSError):  # a full disk was already reported
            self._file.close()
        self._path.unlink(missing_ok=True)


def _check_space(folder: Path, size_bytes: int) -> None:
    if shutil.disk_usage(folder).free < size_bytes + SPARE_BYTES:
        raise _no_space(f"{size_bytes} more bytes do not fit")


@contextmanager
def _space_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise _no_space("it is full") from error


def _no_space(text: str) -> Unavailable:
    return Unavailable(
        f"the artifact store cannot store this now: {text}",
        reason="DEPENDENCY_UNAVAILABLE",
        metadata={"dependency": "artifact store"},
        retry_after_seconds=NO_SPACE_RETRY_SECONDS,
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


async def _in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs blocking work. A cancelled caller waits for its end: until then it uses the file."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise
