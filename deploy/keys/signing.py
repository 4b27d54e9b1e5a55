"""The key that signs tokens, and the public keys that the edge verifies them with."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deploy.keys.files import (
    KeyFileError,
    create_once,
    input_hash_key_path,
    jwks_path,
    keys_dir,
    locked,
    replace,
)
from libs.clock import Clock, SystemClock

ALGORITHM = "ES256"
# Files in the folder of the keys.
CURRENT = "edge.pem"
NEXT = "edge.next.pem"
RETIRED = "retired.json"
LAST_EXPIRY = "last-expiry"

_INPUT_HASH_KEY_BYTES = 32
# `last-expiry` is written at most once in so many seconds of lifetime, not with each token.
_EXPIRY_STEP_SECONDS = 3600


class Retired(NamedTuple):
    """A replaced key.

    Attributes:
        jwk: its public half.
        expires: when its last token has expired, in Unix seconds.
    """

    jwk: Mapping[str, str]
    expires: int


def ensure_keys(home: Path, *, clock: Clock | None = None) -> None:
    """Creates the keys that do not exist yet. Safe to call from several processes concurrently.

    Raises:
        KeyFileError: a file cannot be written, has no valid key, or is readable by other users.
    """
    with locked(home) as folder:
        create_missing(home, folder, clock or SystemClock())


def create_missing(home: Path, folder: Path, clock: Clock) -> ec.EllipticCurvePrivateKey:
    """Does what `ensure_keys` says, for a caller with the lock; returns the key that signs."""
    if not (folder / CURRENT).exists():
        replace(folder / LAST_EXPIRY, b"0")
        create_once(folder / CURRENT, new_key())
    create_once(input_hash_key_path(home), secrets.token_hex(_INPUT_HASH_KEY_BYTES).encode())
    key = read_key(folder / CURRENT)
    publish(home, clock)
    return key


def publish(home: Path, clock: Clock) -> None:
    """Writes the public keys of what is on disk now, so that every process writes the same bytes.

    The key that follows is among them: the edge knows it before it signs.
    """
    folder, now = keys_dir(home), clock.now().timestamp()
    known: list[Mapping[str, str]] = [public_jwk(read_key(folder / CURRENT))]
    if (folder / NEXT).exists():
        known.append(public_jwk(read_key(folder / NEXT)))
    known += [each.jwk for each in read_retired(folder) if each.expires > now]
    keys = list({key["kid"]: key for key in known}.values())  # each once
    replace(jwks_path(home), json.dumps({"keys": keys}, indent=2).encode())


def new_key() -> bytes:
    """Returns a new private key as PEM."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Reads a private key.

    Raises:
        KeyFileError: it is invalid, or other users can read it.
        OSError: there is none.
    """
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


def public_jwk(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    """Returns the public half of a key as a JSON Web Key; its `kid` is its thumbprint."""
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


def read_retired(folder: Path) -> list[Retired]:
    """Reads the replaced keys, the latest first.

    Raises:
        KeyFileError: the file is invalid.
    """
    path = folder / RETIRED
    if not path.exists():
        return []
    try:
        found: Any = json.loads(path.read_bytes())
        return [Retired(dict(each["jwk"]), int(each["expires"])) for each in found]
    except (ValueError, TypeError, KeyError) as error:
        raise KeyFileError(
            f"{path}: is not valid; delete it, which ends the tokens of replaced keys"
        ) from error


def write_retired(folder: Path, keys: Sequence[Retired]) -> None:
    """Writes the replaced keys."""
    content = json.dumps([{"jwk": each.jwk, "expires": each.expires} for each in keys], indent=2)
    replace(folder / RETIRED, content.encode())


def read_last_expiry(folder: Path) -> int | None:
    """Returns when the last token of the key that signs expires, in Unix seconds, at the latest.

    None: it is not known, since an earlier version of Headrace signed tokens with this key.
    """
    try:
        return int((folder / LAST_EXPIRY).read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def note_expiry(folder: Path, expires: float) -> None:
    """Records that a token is signed that expires at a time, in Unix seconds."""
    known = read_last_expiry(folder)
    if known is not None and known < expires:
        steps = math.ceil(expires / _EXPIRY_STEP_SECONDS)
        replace(folder / LAST_EXPIRY, str(steps * _EXPIRY_STEP_SECONDS).encode())


def _base64url(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()
