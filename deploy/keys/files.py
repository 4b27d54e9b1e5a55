"""The folder of the keys: its files, and how they are written.

Every file appears complete or not at all, and is on disk before its writer continues: a machine
that fails at any moment leaves the old file or the new one.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.errors import CliError


class KeyFileError(CliError):
    """A key cannot be created, read or trusted. The message names the file and says what to do."""


def keys_dir(home: Path) -> Path:
    """Returns the folder of the keys."""
    return home / "keys"


def jwks_path(home: Path) -> Path:
    """Returns the file with the public keys that the edge verifies tokens with."""
    return keys_dir(home) / "jwks.json"


def input_hash_key_path(home: Path) -> Path:
    """Returns the file with the key of the hashes that replace inputs in logs."""
    return keys_dir(home) / "input-hash.key"


@contextmanager
def locked(home: Path, name: str = "lock") -> Iterator[Path]:
    """Creates the folder if needed, and lets one process at a time work on it; yields the folder.

    Raises:
        KeyFileError: a file in it cannot be written, also where the caller writes it.
    """
    folder = keys_dir(home)
    try:
        # Parents of a folder are made with the default mode, which lets others read them.
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
        descriptor = os.open(folder / f".{name}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield folder
    except OSError as error:
        raise KeyFileError(f"{error.filename}: cannot create the keys: {error.strerror}") from error


def create_once(path: Path, content: bytes) -> None:
    """Creates a file that only its owner can read. A file that exists is left unchanged."""
    if path.exists():
        return
    draft = _draft(path, content)
    try:
        # Unlike rename, link never replaces a file: if two processes create it, both read one key.
        path.hardlink_to(draft)
    except FileExistsError:
        pass
    finally:
        draft.unlink()
    sync_folder(path.parent)


def replace(path: Path, content: bytes) -> None:
    """Replaces a file, unless it has this content; only its owner can read it."""
    if not path.exists() or path.read_bytes() != content:
        _draft(path, content).replace(path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Writes the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _draft(path: Path, content: bytes) -> Path:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return draft
