"""Unpacks artifacts.

The registry does not know who packed them, so they are not trusted: an artifact may have regular
files only, and all of them inside its folder.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

MAX_FILES = 10_000
_CHUNK_BYTES = 1024 * 1024
_FILE_MODE = 0o644


class ArtifactRefused(Exception):  # noqa: N818  # says what happened
    """The artifact is invalid; the message says why."""


def unpack(artifact: Path, folder: Path, *, limit_bytes: int) -> Mapping[str, str]:
    """Unpacks an uncompressed tar into a new folder and returns the SHA-256 of each file.

    Raises:
        ArtifactRefused: it is not such a tar, or has something that it must not have.
    """
    folder.mkdir(parents=True)
    digests: dict[str, str] = {}
    size_bytes = 0
    try:
        with tarfile.open(artifact, mode="r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                path = _safe_path(member)
                size_bytes += member.size
                if len(digests) >= MAX_FILES or size_bytes > limit_bytes:
                    raise ArtifactRefused(f"has more than {MAX_FILES} files or {limit_bytes} bytes")
                if str(path) in digests:
                    raise ArtifactRefused(f"has {member.name} twice")
                digests[str(path)] = _write(tar, member, folder / path)
    except tarfile.TarError as error:
        raise ArtifactRefused(f"is not an uncompressed tar: {error}") from error
    if "config.pbtxt" not in digests:
        raise ArtifactRefused("has no config.pbtxt at its top")
    return digests


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file, as hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _safe_path(member: tarfile.TarInfo) -> PurePosixPath:
    path = PurePosixPath(member.name)
    if not member.isreg():
        raise ArtifactRefused(f"has {member.name!r}, which is not a regular file")
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in member.name:
        raise ArtifactRefused(f"has {member.name!r}, which leads out of its folder")
    return path


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> str:
    content = tar.extractfile(member)
    if content is None:
        raise ArtifactRefused(f"has {member.name!r}, which cannot be read")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with content, path.open("xb") as stream:
            shutil.copyfileobj(content, stream, _CHUNK_BYTES)
    except (FileExistsError, NotADirectoryError) as error:
        raise ArtifactRefused(f"has {member.name!r} and another file at that path") from error
    path.chmod(_FILE_MODE)
    return file_digest(path)
