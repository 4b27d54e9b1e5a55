"""Searches files for words, as an account that can read them would."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

# A word may lie across the border of two blocks of this size; the blocks overlap.
_BLOCK_BYTES = 16 * 1024 * 1024


def files_with(folder: Path, *words: bytes, skip: Iterable[Path] = ()) -> list[str]:
    """Returns the files below a folder that contain one of the words, relative to it, sorted."""
    skipped = set(skip)
    found = []
    for path in folder.rglob("*"):
        if path in skipped or path.is_symlink() or not path.is_file():
            continue
        if _contains(path, words):
            found.append(str(path.relative_to(folder)))
    return sorted(found)


def _contains(path: Path, words: tuple[bytes, ...]) -> bool:
    overlap = max(map(len, words)) - 1
    rest = b""
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                block = rest + block
                if any(word in block for word in words):
                    return True
                rest = block[-overlap:]
    except FileNotFoundError:  # removed since it was listed
        return False
    return False
