"""Removes a folder that untrusted code filled, and may still write to."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_folder(folder: Path) -> None:
    """Removes a folder with all in it, as far as that is possible, and raises nothing.

    Folders may be of any depth and mode, and links are not followed: each folder inside is moved to
    the uppermost one before it is emptied, so that no path has more than one part. Others must not
    be able to replace the uppermost folder itself.
    """
    with suppress(OSError):
        top = _open(str(folder), None)
        try:
            pending = _empty(top, top)
            while pending:
                name = pending.pop()
                with suppress(OSError):
                    opened = _open(name, top)
                    try:
                        pending += _empty(opened, top)
                    finally:
                        os.close(opened)
                    os.rmdir(name, dir_fd=top)
        finally:
            os.close(top)
        folder.rmdir()


def _open(name: str, parent: int | None) -> int:
    """Opens a folder, and gives its owner all rights to it.

    Raises:
        OSError: it is not a folder, belongs to another account, or does not exist.
    """
    path = os.open(name, _FOLDER, dir_fd=parent)
    try:
        itself = f"/proc/self/fd/{path}"
        os.chmod(itself, 0o700)  # noqa: PTH101  # not a path
        return os.open(itself, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(path)


def _empty(folder: int, top: int) -> list[str]:
    """Removes the files of a folder and moves its folders to the top; returns their new names."""
    moved = []
    for name in os.listdir(folder):  # not a path
        with suppress(OSError):
            mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
            if not stat.S_ISDIR(mode):
                os.unlink(name, dir_fd=folder)
                continue
            os.close(_open(name, folder))  # moving it needs the right to write to it
            new_name = secrets.token_hex(16)
            os.rename(name, new_name, src_dir_fd=folder, dst_dir_fd=top)
            moved.append(new_name)
    return moved
