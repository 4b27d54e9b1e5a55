"""Replacing the key that signs tokens.

Three steps, each complete on disk before the next one, so that a rotation that is interrupted
anywhere leaves keys that work, and the next one continues from there:

1. The new key is written next to the old one, and its public half is published.
2. The edge reads it, without a restart.
3. The new key takes the place of the old one, whose public half stays published until its last
   token has expired. The old private key is gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from deploy.errors import CliError
from deploy.keys.files import locked, replace, sync_folder
from deploy.keys.signing import (
    CURRENT,
    LAST_EXPIRY,
    NEXT,
    RETIRED,
    Retired,
    create_missing,
    new_key,
    public_jwk,
    publish,
    read_key,
    read_last_expiry,
    read_retired,
    write_retired,
)
from deploy.keys.tokens import MAX_TTL_SECONDS, sign
from libs.clock import Clock, SystemClock

# Replaced keys that still verify tokens. Each makes the file that the edge reads longer.
MAX_RETIRED_KEYS = 16
# Of the token that asks the edge whether it knows the new key; it has no scopes.
PROBE_TTL_SECONDS = 60
_PROBE = {"tenant": "headrace", "sub": "key-rotation", "scopes": "", "max_priority": 0}


@dataclass(frozen=True, kw_only=True)
class SigningKey:
    """A key that the edge verifies tokens with.

    Attributes:
        id: its `kid`, the thumbprint of its public half.
        state: `signs`; `retired`: it verifies tokens until they expire; `next`: a rotation was
            interrupted, and the next one continues with it.
        expires: when a retired key verifies nothing any more; None for the others.
    """

    id: str
    state: str
    expires: datetime | None = None


def signing_keys(home: Path, *, clock: Clock | None = None) -> Sequence[SigningKey]:
    """Returns the keys that tokens are verified with, the one that signs first.

    Raises:
        KeyFileError: see `ensure_keys`.
    """
    clock = clock or SystemClock()
    with locked(home) as folder:
        current = public_jwk(create_missing(home, folder, clock))["kid"]
        keys = [SigningKey(id=current, state="signs")]
        if (folder / NEXT).exists():
            keys.append(SigningKey(id=public_jwk(read_key(folder / NEXT))["kid"], state="next"))
        return keys + [
            SigningKey(
                id=each.jwk["kid"],
                state="retired",
                expires=datetime.fromtimestamp(each.expires, UTC),
            )
            for each in _live(folder, clock)
            if each.jwk["kid"] != current
        ]


def rotate(
    home: Path,
    *,
    introduce: Callable[[str], None],
    revoke: bool = False,
    clock: Clock | None = None,
) -> Sequence[SigningKey]:
    """Replaces the key that signs tokens, and returns the keys as `signing_keys` does.

    Args:
        home: the mesh's `HEADRACE_HOME`.
        introduce: called with a token that the new key signed, when its public half is in the file
            that the edge verifies with; returns when the edge has read that and accepts the token.
            If it raises, the old key remains the one that signs.
        revoke: whether the tokens of all earlier keys end immediately: a key may have been stolen.
            The new key then signs before the edge has read it.
        clock: gives the current time.

    Raises:
        CliError: too many replaced keys still have valid tokens.
        KeyFileError: see `ensure_keys`.
    """
    clock = clock or SystemClock()
    with locked(home, "rotation"):
        with locked(home) as folder:
            create_missing(home, folder, clock)
            if revoke:
                # Not one that an interrupted rotation left: it may have been stolen, too.
                replace(folder / NEXT, new_key())
                _promote(folder, retired=[], clock=clock)
                key = read_key(folder / CURRENT)
            else:
                if len(_live(folder, clock)) >= MAX_RETIRED_KEYS:
                    raise CliError(
                        f"{MAX_RETIRED_KEYS} replaced keys still have valid tokens; rotate again "
                        "when one of `headrace key ls` has expired, or end them with --now"
                    )
                if not (folder / NEXT).exists():
                    replace(folder / NEXT, new_key())
                key = read_key(folder / NEXT)
            publish(home, clock)
        introduce(sign(key, _PROBE, ttl_seconds=PROBE_TTL_SECONDS, clock=clock))
        if not revoke:
            with locked(home) as folder:
                _promote(folder, retired=_with_current(folder, clock), clock=clock)
                publish(home, clock)
    return signing_keys(home, clock=clock)


def _live(folder: Path, clock: Clock) -> list[Retired]:
    now = clock.now().timestamp()
    return [each for each in read_retired(folder) if each.expires > now]


def _with_current(folder: Path, clock: Clock) -> list[Retired]:
    """Returns the replaced keys with the one that signs now."""
    jwk = public_jwk(read_key(folder / CURRENT))
    expires = read_last_expiry(folder)
    if expires is None:
        expires = math.ceil(clock.now().timestamp()) + MAX_TTL_SECONDS
    others = [each for each in _live(folder, clock) if each.jwk["kid"] != jwk["kid"]]
    return [Retired(jwk, expires), *others]


def _promote(folder: Path, *, retired: Sequence[Retired], clock: Clock) -> None:
    """Lets the next key sign. The rename decides: before it, the old key signs."""
    if retired or (folder / RETIRED).exists():
        write_retired(folder, retired)
    (folder / NEXT).replace(folder / CURRENT)
    sync_folder(folder)
    expires = math.ceil(clock.now().timestamp()) + PROBE_TTL_SECONDS
    replace(folder / LAST_EXPIRY, str(expires).encode())
