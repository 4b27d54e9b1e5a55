"""Unpacks artifacts.

The registry does not know who packed them, so they are not trusted: `libs.artifact_tar` says what
they may have, and `libs.model_config` what their configuration may say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from libs.artifact_tar import TarFile, TarRefusedError, read_file, tar_files
from libs.model_config import CONFIG_NAME, ModelConfigRefusedError, check_file, read_config

# In the folder of a version, the agent's own record of its files.
RECORD_NAME = ".headrace.json"
_CHUNK_BYTES = 1024 * 1024
_FILE_MODE = 0o644


class ArtifactRefused(Exception):  # noqa: N818  # says what happened
    """The artifact is invalid; the message says why."""


def unpack(artifact: Path, folder: Path, *, limit_bytes: int) -> Mapping[str, str]:
    """Unpacks an uncompressed tar into a new folder and returns the SHA-256 of each file.

    All of the tar is checked before the first file is written. Memory and disk are limited.

    Raises:
        ArtifactRefused: it is not such a tar, or has something that it must not have.
    """
    digests: dict[str, str] = {}
    with artifact.open("rb") as tar:
        files = _checked_files(tar, limit_bytes=limit_bytes)
        folder.mkdir(parents=True)
        for file in files:
            digests[str(file.path)] = _write(tar, file, folder / file.path)
    return digests


def is_safe(folder: Path, names: Iterable[str]) -> bool:
    """Returns whether Triton may load an unpacked version, by the rules of today.

    An agent of an earlier release, whose rules allowed more, may have unpacked it.
    """
    config = folder / CONFIG_NAME
    try:
        for name in names:
            check_file(PurePosixPath(name))
        read_config(config.stat().st_size, config.read_bytes)
    except ModelConfigRefusedError:
        return False
    return True


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file, as hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _checked_files(tar: BinaryIO, *, limit_bytes: int) -> list[TarFile]:
    files = []
    size_bytes = 0
    try:
        for file in tar_files(tar):
            size_bytes += file.size_bytes
            if size_bytes > limit_bytes:
                raise ArtifactRefused(f"has more than {limit_bytes} bytes in its files")
            check_file(file.path)
            if str(file.path) == CONFIG_NAME:
                read_config(file.size_bytes, partial(read_file, tar, file))
            files.append(file)
    except (TarRefusedError, ModelConfigRefusedError) as error:
        raise ArtifactRefused(str(error)) from error
    names = {str(file.path).casefold() for file in files}
    if RECORD_NAME in names:
        raise ArtifactRefused(f"has {RECORD_NAME}, a name that the pool agent uses")
    if CONFIG_NAME not in (str(file.path) for file in files):
        raise ArtifactRefused(f"has no {CONFIG_NAME} at its top")
    return files


def _write(tar: BinaryIO, file: TarFile, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    tar.seek(file.offset)
    left = file.size_bytes
    with path.open("xb") as stream:
        while left:
            chunk = tar.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise ArtifactRefused(f"is an incomplete tar: {file.path} is cut off")
            left -= len(chunk)
            digest.update(chunk)
            stream.write(chunk)
    path.chmod(_FILE_MODE)
    return digest.hexdigest()
