"""Secrets between the processes of a mesh: the users of the bus, and Triton's control API."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from pathlib import Path

from deploy.keys.files import KeyFileError, create_once, keys_dir, locked

_SECRET_BYTES = 32


def triton_control_key_path(home: Path) -> Path:
    """Returns the file with the secret of the calls that change what Triton serves."""
    return keys_dir(home) / "triton-control.key"


def ensure_triton_control_key(home: Path) -> Path:
    """Creates the secret if needed, and returns its file.

    Raises:
        KeyFileError: see `ensure_keys`.
    """
    with locked(home):
        create_once(triton_control_key_path(home), secrets.token_hex(_SECRET_BYTES).encode())
    return triton_control_key_path(home)


def nats_credentials_path(home: Path, user: str) -> Path:
    """Returns the file with `USER:PASSWORD` of a user of the bus."""
    return keys_dir(home) / f"nats-{user}.credentials"


def ensure_nats_credentials(home: Path, users: Iterable[str]) -> dict[str, str]:
    """Returns the passwords of the users of the bus; creates those that do not exist yet.

    Raises:
        KeyFileError: see `ensure_keys`; or a file has another form.
    """
    passwords = {}
    with locked(home):
        for user in users:
            path = nats_credentials_path(home, user)
            create_once(path, f"{user}:{secrets.token_hex(_SECRET_BYTES)}".encode())
            name, _, password = path.read_text().strip().partition(":")
            if name != user or not password:
                raise KeyFileError(f"{path}: must have {user}:PASSWORD; delete it to get a new one")
            passwords[user] = password
    return passwords
