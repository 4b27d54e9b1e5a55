"""API keys of providers: one file for each in `HEADRACE_HOME/secrets`, which `inference` reads.

A file has the key and the prefix of the URLs that it may be sent to. A version's artifact names the
file, so without the prefix a deployer could have the key sent to a server of their own.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import CliError
from deploy.keys.files import replace, sync_folder
from libs.http_client import Url

MAX_KEY_BYTES = 8192

# As manifests name keys.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_KEY = re.compile(r"[\x21-\x7e]+")
_MODE = 0o700


@dataclass(frozen=True, kw_only=True)
class ProviderKey:
    """A key, without its secret.

    Attributes:
        name: of its file; the `api_key_name` of manifests.
        url_prefix: of the URLs that it may be sent to; empty where `problem` is not.
        problem: why no request can use it; empty: none.
    """

    name: str
    url_prefix: str
    problem: str = ""


def secrets_dir(home: Path) -> Path:
    """Returns the folder of the keys."""
    return home / "secrets"


def add(home: Path, name: str, *, url_prefix: str, key: str) -> ProviderKey:
    """Writes a key, or replaces it. `inference` uses it within a second.

    Raises:
        CliError: the name, the prefix or the key is invalid, or the file cannot be written.
    """
    path = _path(home, name)
    prefix = _prefix(url_prefix)
    key = key.strip()
    if len(key) > MAX_KEY_BYTES or not _KEY.fullmatch(key):
        raise CliError("the API key must be one line of printable ASCII without spaces")
    try:
        path.parent.mkdir(mode=_MODE, parents=True, exist_ok=True)
        path.parent.chmod(_MODE)
        replace(path, json.dumps({"url_prefix": str(prefix), "key": key}, indent=2).encode())
    except OSError as error:
        raise CliError(f"{path}: cannot be written: {error.strerror}") from error
    return ProviderKey(name=name, url_prefix=str(prefix))


def listed(home: Path) -> list[ProviderKey]:
    """Returns the keys, by name.

    Raises:
        CliError: the folder cannot be read.
    """
    folder = secrets_dir(home)
    try:
        names = sorted(path.name for path in folder.iterdir() if _NAME.fullmatch(path.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CliError(f"{folder}: cannot be read: {error.strerror}") from error
    return [_read(folder / name) for name in names]


def remove(home: Path, name: str) -> None:
    """Deletes a key. Requests that need it fail within a second.

    Raises:
        CliError: there is none, or it cannot be deleted.
    """
    path = _path(home, name)
    try:
        path.unlink()
        sync_folder(path.parent)
    except FileNotFoundError:
        raise CliError(
            f"no API key has the name {name!r}; see `headrace provider key ls`"
        ) from None
    except OSError as error:
        raise CliError(f"{path}: cannot be deleted: {error.strerror}") from error


def _path(home: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise CliError(
            f"the name {name[:128]!r} must be 1 to 64 characters of A-Z a-z 0-9 . _ - and start "
            "with a letter or digit"
        )
    return secrets_dir(home) / name


def _prefix(text: str) -> Url:
    try:
        return Url.parse(text)
    except ValueError as error:
        raise CliError(f"--url-prefix {text[:128]!r} is not valid: {error}") from error


def _read(path: Path) -> ProviderKey:
    try:
        mode = path.stat().st_mode
        content = path.read_text()
        fields = json.loads(content) if content.lstrip().startswith("{") else None
        prefix = "" if fields is None else str(Url.parse(fields["url_prefix"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ProviderKey(name=path.name, url_prefix="", problem="cannot be read; add it again")
    if not prefix:
        problem = "has no URL prefix; add it again with --url-prefix"
        return ProviderKey(name=path.name, url_prefix="", problem=problem)
    problem = "other users can read it; run chmod 600 on it" if mode & 0o077 else ""
    return ProviderKey(name=path.name, url_prefix=prefix, problem=problem)
