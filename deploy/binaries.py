"""The third-party programs that a mesh runs: which ones they are, by digest.

They come from third-party packages. `binaries.json` has the digest of each file as it
was reviewed; nothing else is started.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import CliError
from deploy.host import REPOSITORY

LIST_FILE = Path(__file__).with_name("binaries.json")
# Next to the programs: an account that can change it can change them as well.
CACHE_FILE = REPOSITORY / ".venv" / ".verified-binaries.json"
OK, OWN, ABSENT, CHANGED, MISSING = "ok", "own", "absent", "changed", "missing"
WRONG = (CHANGED, MISSING)
_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Binary:
    """One program, with the libraries that it comes with.

    Attributes:
        name: such as `envoy`.
        version: the version of the program.
        package: the package that it comes from, with its version.
        built_by: who built it, as far as is known.
        compare: how an operator compares it with its maker's release.
        files: the digests, `sha256` in hexadecimal, by path. The first one is the program.
        setting: the variable of the environment that names another program to use instead; empty:
            there is none.
        optional: whether a mesh runs without it.
    """

    name: str
    version: str
    package: str
    built_by: str
    compare: str
    files: Mapping[str, str]
    setting: str = ""
    optional: bool = False

    def own_program(self) -> Path | None:
        """Returns the program that the operator uses instead; it is not compared."""
        path = os.environ.get(self.setting) if self.setting else None
        return Path(path).absolute() if path else None

    def program(self) -> Path:
        """Returns the path of the program.

        Raises:
            CliError: it is not installed.
        """
        found = self.own_program() or _find(next(iter(self.files)))
        if found is None or not os.access(found, os.X_OK):
            raise CliError(f"{self.name} is not installed at {found}; {self._action()}")
        return found

    def complaint(self, state: str) -> str:
        """Returns what is wrong and what to do."""
        what = "is not complete" if state == MISSING else "is not the program that was reviewed"
        return f"{self.name} {self.version} from {self.package} {what}; {self._action()}"

    def _action(self) -> str:
        own = f", or set {self.setting} to a program of your own" if self.setting else ""
        return f"remove .venv and .venv-triton and run `make install`{own}"


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What a verification found.

    Attributes:
        state: `OK`; `CHANGED`: a file has another digest; `MISSING`: a file is not there;
            `ABSENT`: an optional program is not installed; `OWN`: the program is the operator's,
            whose digest is shown but not compared.
        digests: the digests of the files by their paths on this machine.
    """

    binary: Binary
    state: str
    digests: Mapping[str, str]


class Digests:
    """Digests of files. One that is known is not read again.

    It is known while the file's size, times and inode stay the same.
    """

    def __init__(self, cache_file: Path | None) -> None:
        """Reads the known digests; without a file, none is known."""
        self._file = cache_file
        self._known: dict[str, list[str]] = {}
        with suppress(OSError, ValueError):
            if cache_file is not None:
                self._known = dict(json.loads(cache_file.read_text()))

    def of(self, path: Path) -> str:
        """Returns the digest of a file.

        Raises:
            OSError: it cannot be read.
        """
        key, facts = str(path), _facts(path)
        known = self._known.get(key)
        if known is None or known[0] != facts:
            known = self._known[key] = [facts, _sha256(path)]
        return known[1]

    def save(self) -> None:
        """Stores what is known. Where the folder cannot be written, the next start reads again."""
        if self._file is None:
            return
        draft = self._file.with_name(f"{self._file.name}.{secrets.token_hex(4)}")
        with suppress(OSError):
            draft.write_text(json.dumps(self._known))
            draft.replace(self._file)


def binaries(list_file: Path = LIST_FILE) -> list[Binary]:
    """Returns all programs of the list."""
    return [Binary(**entry) for entry in json.loads(list_file.read_text())]


def named(name: str) -> Binary:
    """Returns a program of the list."""
    (found,) = [binary for binary in binaries() if binary.name == name]
    return found


def program(name: str) -> Path:
    """Returns the path of a program.

    Raises:
        CliError: it is not installed.
    """
    return named(name).program()


def check(names: Iterable[str]) -> None:
    """Checks programs before they are started.

    Raises:
        CliError: one is not the one of the list.
    """
    wanted = set(names)
    listed = [binary for binary in binaries() if binary.name in wanted]
    for found in verify(listed, Digests(CACHE_FILE)):
        if found.state in WRONG:
            raise CliError(found.binary.complaint(found.state))


def verify(listed: Sequence[Binary], digests: Digests) -> list[Verified]:
    """Compares programs with the list; files are read in parallel."""
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        work = [pool.submit(_verified, binary, digests) for binary in listed]
        results = [each.result() for each in work]
    digests.save()
    return results


def _verified(binary: Binary, digests: Digests) -> Verified:
    own = binary.own_program()
    if own is not None:
        state, found = OWN, {str(own): _digest_or_empty(own, digests)}
        return Verified(binary=binary, state=state if found[str(own)] else MISSING, digests=found)
    state, found = OK, {}
    for name, expected in binary.files.items():
        path = _find(name)
        actual = _digest_or_empty(path, digests) if path else ""
        found[str(path or name)] = actual
        if actual != expected and state != MISSING:
            state = CHANGED if actual else MISSING
    if binary.optional and not any(found.values()):
        state = ABSENT
    return Verified(binary=binary, state=state, digests=found)


def _digest_or_empty(path: Path, digests: Digests) -> str:
    try:
        return digests.of(path)
    except OSError:
        return ""


def _find(name: str) -> Path | None:
    """Returns the file of the list on this machine: the version of Python is in its path."""
    return next(iter(sorted(REPOSITORY.glob(name))), None)


def _facts(path: Path) -> str:
    status = path.stat()
    facts = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return ":".join(map(str, facts))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
