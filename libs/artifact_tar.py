"""Reads the headers of an artifact: an uncompressed tar of regular files.

Its origin is not trusted, so this reader is strict and small, where general ones are neither:
they read names and extended headers of any size into memory, follow chains of those recursively,
and extract sparse files and links. Files of equal names, or of names that differ in case only, are
refused: which of them counts would depend on who reads them.

Formats: ustar, GNU (long names) and pax (long or non-ASCII names; times are ignored).
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import BinaryIO

MAX_FILES = 10_000
MAX_PATH_BYTES = 1024
MAX_DEPTH = 16
# Headers that extend the next one: names, times, and what other programs add.
MAX_EXTENSION_BYTES = 16 * 1024
# Programs fill the last record with zeros.
MAX_PADDING_BYTES = 1024 * 1024

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_MAGICS = (b"ustar\x0000", b"ustar  \x00", bytes(8))  # POSIX, GNU, and older than both
_MAX_NAME_IN_MESSAGE = 64
_MAX_COMPONENT_BYTES = 255
_SET_ID_BITS = 0o6000

_FILE, _OLD_FILE, _FOLDER = b"0", b"\0", b"5"
_LONG_NAME, _PAX, _GLOBAL_PAX = b"L", b"x", b"g"
_REFUSED_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"7": "a contiguous file",
    b"D": "an incremental dump",
    b"K": "a link with a long name",
    b"M": "a part of a file in another archive",
    b"S": "a sparse file",
    b"V": "a volume header",
}
# What a pax header may say, of which only the path counts. Anything else could change what the file
# is.
_PAX_KEYS = frozenset(
    {
        "path", "comment", "mtime", "atime", "ctime", "uid", "gid", "uname", "gname",
        "SCHILY.dev", "SCHILY.fflags", "SCHILY.ino", "SCHILY.nlink",
    }
)  # fmt: skip
_PAX_PREFIXES = ("LIBARCHIVE.", "SCHILY.acl.", "SCHILY.xattr.")


class TarRefusedError(Exception):
    """The file is not such a tar; the message says why, as in "the artifact has a device"."""


@dataclass(frozen=True)
class TarFile:
    """A regular file in the tar.

    Attributes:
        path: relative, without `..`; unique also where case does not count.
        offset: where its bytes start in the tar.
        size_bytes: how many they are.
    """

    path: PurePosixPath
    offset: int
    size_bytes: int


def tar_files(tar: BinaryIO) -> Iterator[TarFile]:
    """Yields the files of a tar, with a limited amount of memory, and checks all of it.

    Args:
        tar: seekable; its position may be changed between two files.

    Raises:
        TarRefusedError: it is not an uncompressed tar, or has something that it must not have.
    """
    end = tar.seek(0, os.SEEK_END)
    names = _Names()
    position = 0
    name = ""  # from headers before
    while True:
        block = _read(tar, position, _BLOCK)
        if block == _ZEROS and position:
            _check_padding(tar, position, end)
            return
        header = _Header(block, position)
        position += _BLOCK
        size = header.size_bytes
        if position + size > end:
            raise TarRefusedError(
                f"is an incomplete tar: {_quoted(name or header.name)} is cut off"
            )
        if header.type in (_LONG_NAME, _PAX, _GLOBAL_PAX):
            names.count_header()
            content = _extension(tar, position, size)
            if header.type == _LONG_NAME:
                name = _text(content.rstrip(b"\0"))
            else:
                found = _pax_path(content, is_global=header.type == _GLOBAL_PAX)
                name = found or name
        else:
            path = names.add(name or header.name, header)
            name = ""
            if path is not None:
                yield TarFile(path, position, size)
        position += -(-size // _BLOCK) * _BLOCK


def read_file(tar: BinaryIO, file: TarFile) -> bytes:
    """Returns the bytes of a file; check its size first. Changes the tar's position."""
    tar.seek(file.offset)
    return tar.read(file.size_bytes)


class _Header:
    """One block that describes what follows it."""

    def __init__(self, block: bytes, position: int) -> None:
        """Reads a block.

        Raises:
            TarRefusedError: it is not a header.
        """
        if not _is_header(block):
            where = f": no valid header at byte {position}" if position else ""
            raise TarRefusedError(f"is not an uncompressed tar{where}")
        self.type = block[156:157]
        self.mode = _number(block[100:108])
        self.size_bytes = _number(block[124:136])
        name, prefix = _field(block[0:100]), _field(block[345:500])
        self.name = _text(name)
        if prefix and block[257:265] == _MAGICS[0]:
            self.name = f"{_text(prefix)}/{self.name}"
        if self.type == _FOLDER:  # some programs write another number
            self.size_bytes = 0


def _is_header(block: bytes) -> bool:
    try:
        checksum = int(_field(block[148:156]).strip() or b"x", 8)
    except ValueError:
        return False
    computed = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    return checksum == computed and block[257:265] in _MAGICS


@dataclass
class _Names:
    """The names seen so far."""

    files: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)
    headers: int = 0

    def count_header(self) -> None:
        """Counts a header.

        Raises:
            TarRefusedError: there are too many.
        """
        self.headers += 1
        if self.headers > 4 * MAX_FILES:
            raise TarRefusedError(f"has more than {4 * MAX_FILES} headers")

    def add(self, name: str, header: _Header) -> PurePosixPath | None:
        """Returns the path of a file; None: it is a folder.

        Raises:
            TarRefusedError: the artifact must not have this.
        """
        self.count_header()
        # The oldest tars mark folders by a slash.
        if header.type == _FOLDER or (header.type == _OLD_FILE and name.endswith("/")):
            if PurePosixPath(name).parts:
                self._add_folders(_safe_path(name), name)
            return None
        if header.type not in (_FILE, _OLD_FILE):
            what = _REFUSED_TYPES.get(header.type, "not a regular file")
            raise TarRefusedError(f"has {_quoted(name)}, which is {what}")
        if header.mode & _SET_ID_BITS:
            raise TarRefusedError(f"has {_quoted(name)}, which would run as another user")
        path = _safe_path(name)
        key = _key(path)
        if len(self.files) >= MAX_FILES:
            raise TarRefusedError(f"has more than {MAX_FILES} files")
        if key in self.files or key in self.folders:
            raise TarRefusedError(f"has {_quoted(name)} twice, or names that differ in case only")
        self._add_folders(path.parent, name)
        self.files.add(key)
        return path

    def _add_folders(self, folder: PurePosixPath, name: str) -> None:
        while folder.parts:
            key = _key(folder)
            if key in self.files:
                raise TarRefusedError(f"has {_quoted(name)} and a file at {_quoted(str(folder))}")
            if key in self.folders:
                return
            if len(self.folders) >= MAX_FILES:
                raise TarRefusedError(f"has more than {MAX_FILES} folders")
            self.folders.add(key)
            folder = folder.parent


def _safe_path(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise TarRefusedError(f"has {_quoted(name)}, which leads out of its folder")
    if "\\" in name or any(unicodedata.category(each) in ("Cc", "Cf") for each in name):
        raise TarRefusedError(f"has {_quoted(name)}, a name with control characters or backslashes")
    too_long = max(len(part.encode()) for part in path.parts) > _MAX_COMPONENT_BYTES
    if too_long or len(name.encode()) > MAX_PATH_BYTES or len(path.parts) > MAX_DEPTH:
        raise TarRefusedError(
            f"has {_quoted(name)}, a path of more than {MAX_PATH_BYTES} bytes or {MAX_DEPTH} parts"
        )
    return path


def _key(path: PurePosixPath) -> str:
    """Returns what is equal for names that some file systems take for one."""
    return unicodedata.normalize("NFC", str(path)).casefold()


def _extension(tar: BinaryIO, position: int, size: int) -> bytes:
    if size > MAX_EXTENSION_BYTES:
        raise TarRefusedError(f"has a header of {size} bytes, more than {MAX_EXTENSION_BYTES}")
    return _read(tar, position, size)


def _pax_path(content: bytes, *, is_global: bool) -> str:
    """Returns the path that a pax header gives to the next file, or an empty text."""
    path = ""
    while content:
        length, space, _ = content[:8].partition(b" ")
        size = int(length) if length.isdigit() and space else 0
        record, content = content[len(length) + 1 : size], content[size:]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise TarRefusedError("has a malformed pax header")
        name = _text(key)
        known = name in _PAX_KEYS or name.startswith(_PAX_PREFIXES)
        if not known or (is_global and name == "path"):
            raise TarRefusedError(f"has a pax header with {_quoted(name)}, which is not supported")
        if name == "path":
            path = _text(value[:-1])
    return path


def _check_padding(tar: BinaryIO, position: int, end: int) -> None:
    if end - position > MAX_PADDING_BYTES or any(_read(tar, position, end - position)):
        raise TarRefusedError("has data after its end")


def _read(tar: BinaryIO, position: int, size: int) -> bytes:
    tar.seek(position)
    data = tar.read(size)
    if len(data) != size:
        ends = "is an incomplete tar: it has no end" if position else "is not an uncompressed tar"
        raise TarRefusedError(ends)
    return data


def _field(raw: bytes) -> bytes:
    return raw.partition(b"\0")[0]


def _number(raw: bytes) -> int:
    """Returns a number, in octal digits or, as GNU writes large ones, in binary.

    Raises:
        TarRefusedError: it is neither, or negative.
    """
    if raw[0] == 0x80:  # noqa: PLR2004  # GNU's mark of a positive number
        return int.from_bytes(raw[1:], "big")
    digits = _field(raw).strip()
    if not digits:
        return 0
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise TarRefusedError("has a header with a malformed number")
    return int(digits, 8)


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise TarRefusedError("has a name that is not UTF-8") from error


def _quoted(name: str) -> str:
    cut = name if len(name) <= _MAX_NAME_IN_MESSAGE else f"{name[:_MAX_NAME_IN_MESSAGE]}…"
    return repr(cut)
