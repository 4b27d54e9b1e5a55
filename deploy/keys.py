"""The keys of one mesh, and the tokens that they sign.

`HEADRACE_HOME/keys` (mode 0700) holds `edge.pem`, the ES256 key that signs tokens; `jwks.json`, its
public half, which the edge verifies tokens with; `input-hash.key`, the key of the hashes that
replace inputs in logs; `triton-control.key`, without which nobody changes what Triton serves; and
`nats-USER.credentials`, the passwords of the services on the bus.
They are created at the first start and never replaced, so that tokens and hashes stay valid over
restarts.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deploy.errors import CliError
from libs.clock import Clock, SystemClock

ISSUER = "headrace"
AUDIENCE = "headrace"
ALGORITHM = "ES256"
# What a token can allow. No scope includes another one. The scope `internal`, which the mesh's own
# calls carry, is not among them: a token never has it.
SCOPES: Mapping[str, str] = {
    "infer": "call models and submit jobs",
    "read": "see models, deployments, routes, prices and costs",
    "admin": "change models, deployments and prices",
}
DEFAULT_SCOPES = "infer read"
DEFAULT_TTL_SECONDS = 12 * 60 * 60
MAX_TTL_SECONDS = 366 * 24 * 60 * 60

_INPUT_HASH_KEY_BYTES = 32
_SECRET_BYTES = 32
# The edge copies these claims into headers unchanged, so they must be valid in a header.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}")


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


def triton_control_key_path(home: Path) -> Path:
    """Returns the file with the secret of the calls that change what Triton serves."""
    return keys_dir(home) / "triton-control.key"


def nats_credentials_path(home: Path, user: str) -> Path:
    """Returns the file with `USER:PASSWORD` of a user of the bus."""
    return keys_dir(home) / f"nats-{user}.credentials"


def ensure_nats_credentials(home: Path, users: Iterable[str]) -> dict[str, str]:
    """Returns the passwords of the users of the bus; creates those that do not exist yet.

    Raises:
        KeyFileError: see `ensure_keys`; or a file has another form.
    """
    ensure_keys(home)
    passwords = {}
    for user in users:
        path = nats_credentials_path(home, user)
        try:
            _create_once(path, f"{user}:{secrets.token_hex(_SECRET_BYTES)}".encode())
            name, _, password = path.read_text().strip().partition(":")
        except OSError as error:
            raise KeyFileError(f"{path}: cannot be used: {error.strerror}") from error
        if name != user or not password:
            raise KeyFileError(f"{path}: must have {user}:PASSWORD; delete it to get a new one")
        passwords[user] = password
    return passwords


def ensure_keys(home: Path) -> None:
    """Creates the keys that do not exist yet. Safe to call from several processes at once.

    Raises:
        KeyFileError: a file cannot be written, has no valid key, or is readable by other users.
    """
    folder = keys_dir(home)
    try:
        # Parents of a folder are made with the default mode, which lets others read them.
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
        _create_once(folder / "edge.pem", _new_signing_key())
        _create_once(input_hash_key_path(home), secrets.token_hex(_INPUT_HASH_KEY_BYTES).encode())
        _create_once(triton_control_key_path(home), secrets.token_hex(_SECRET_BYTES).encode())
        # Derived from the key that is on disk now, so that every process writes the same bytes.
        _replace(jwks_path(home), _jwks(_signing_key(home)))
    except OSError as error:
        raise KeyFileError(f"{error.filename}: cannot create the keys: {error.strerror}") from error


def mint_token(
    home: Path,
    *,
    tenant: str,
    user: str,
    scopes: str = DEFAULT_SCOPES,
    ttl_seconds: int = DEFAULT_TTL_SECONDS,
    clock: Clock | None = None,
) -> str:
    """Signs a token that the edge of the mesh at `home` accepts. Creates the keys if needed.

    Args:
        home: the mesh's `HEADRACE_HOME`.
        tenant: who pays.
        user: who calls.
        scopes: names of `SCOPES` separated by spaces, as in OAuth; may be empty.
        ttl_seconds: how long the token is valid from now on.
        clock: gives the current time.

    Raises:
        ValueError: an argument cannot be in a token; the message says what is allowed.
        KeyFileError: see `ensure_keys`.
    """
    for name, value in [("tenant", tenant), ("user", user)]:
        if not _NAME.fullmatch(value):
            raise ValueError(
                f"{name} {value!r} must be 1 to 128 characters of A-Z a-z 0-9 . _ @ + -"
                " and start with a letter or digit"
            )
    for scope in scopes.split():
        if scope not in SCOPES:
            raise ValueError(f"unknown scope {scope!r}; a scope must be one of {', '.join(SCOPES)}")
    if not 0 < ttl_seconds <= MAX_TTL_SECONDS:
        raise ValueError(f"the time to live must be 1 to {MAX_TTL_SECONDS} seconds")
    ensure_keys(home)
    key = _signing_key(home)
    now = (clock or SystemClock()).now()
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": user,
        "tenant": tenant,
        "scopes": " ".join(scopes.split()),
        "iat": now,
        "exp": now + timedelta(seconds=ttl_seconds),
    }
    return jwt.encode(claims, key, algorithm=ALGORITHM, headers={"kid": _public_jwk(key)["kid"]})


def _new_signing_key() -> bytes:
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _signing_key(home: Path) -> ec.EllipticCurvePrivateKey:
    path = keys_dir(home) / "edge.pem"
    if path.stat().st_mode & 0o077:
        raise KeyFileError(f"{path}: other users can read it; run chmod 600, or delete it")
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except ValueError as error:
        raise KeyFileError(
            f"{path}: invalid PEM private key; delete it to get a new one"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise KeyFileError(f"{path}: not a P-256 key; delete it to get a new one")
    return key


def _public_jwk(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    numbers = key.public_key().public_numbers()
    required = {
        "crv": "P-256",
        "kty": "EC",
        "x": _base64url(numbers.x.to_bytes(32)),
        "y": _base64url(numbers.y.to_bytes(32)),
    }
    # RFC 7638: the required members in lexical order, without white space.
    thumbprint = hashlib.sha256(json.dumps(required, separators=(",", ":")).encode()).digest()
    return {**required, "alg": ALGORITHM, "use": "sig", "kid": _base64url(thumbprint)}


def _jwks(key: ec.EllipticCurvePrivateKey) -> bytes:
    return json.dumps({"keys": [_public_jwk(key)]}, indent=2).encode()


def _base64url(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def _create_once(path: Path, content: bytes) -> None:
    """Creates a file atomically. A file that exists is left unchanged."""
    if path.exists():
        return
    draft = _draft(path, content, mode=0o600)
    try:
        # Unlike rename, link never replaces a file: if two processes create it, both read one key.
        path.hardlink_to(draft)
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def _replace(path: Path, content: bytes) -> None:
    """Replaces a file atomically: readers see either the old content or the new one."""
    if not path.exists() or path.read_bytes() != content:
        _draft(path, content, mode=0o644).replace(path)


def _draft(path: Path, content: bytes, *, mode: int) -> Path:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return draft
