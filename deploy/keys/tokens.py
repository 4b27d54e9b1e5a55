"""Tokens: what they can say, and how they are signed."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import jwt
from cryptography.hazmat.primitives.asymmetric import ec

from deploy.keys.files import locked
from deploy.keys.signing import ALGORITHM, create_missing, note_expiry, public_jwk
from libs.chat.request import MAX_PRIORITY
from libs.claims import NAME_RULE, is_name
from libs.clock import Clock, SystemClock

ISSUER = "headrace"
AUDIENCE = "headrace"
# What a token can allow. No scope includes another one. The scope `internal`, which the mesh's own
# calls carry, is not among them: a token never has it.
SCOPES: Mapping[str, str] = {
    "infer": "call models and submit jobs",
    "read": "see models, deployments, routes, prices and costs",
    "registry": "change models, versions, artifacts and deployments; see their providers",
    "router": "change how requests are routed",
    "billing": "set prices; see prices and costs of all tenants",
    "operator": "operate the mesh: all that the others do not cover",
}
DEFAULT_SCOPES = "infer read"
DEFAULT_TTL_SECONDS = 12 * 60 * 60
MAX_TTL_SECONDS = 366 * 24 * 60 * 60


def mint_token(
    home: Path,
    *,
    tenant: str,
    user: str,
    scopes: str = DEFAULT_SCOPES,
    max_priority: int = 0,
    ttl_seconds: int = DEFAULT_TTL_SECONDS,
    clock: Clock | None = None,
) -> str:
    """Signs a token that the edge of the mesh at `home` accepts. Creates the keys if needed.

    Args:
        home: the mesh's `HEADRACE_HOME`.
        tenant: who pays.
        user: who calls.
        scopes: names of `SCOPES` separated by spaces, as in OAuth; may be empty.
        max_priority: the highest priority that its requests may ask for.
        ttl_seconds: how long the token is valid from now on.
        clock: gives the current time.

    Raises:
        ValueError: an argument cannot be in a token; the message says what is allowed.
        KeyFileError: see `ensure_keys`.
    """
    for name, value in [("tenant", tenant), ("user", user)]:
        if not is_name(value):
            raise ValueError(f"{name} {value!r} {NAME_RULE}")
    words = scopes.split()
    for scope in words:
        _check_scope(scope)
    if not 0 <= max_priority <= MAX_PRIORITY:
        raise ValueError(f"the maximum priority must be from 0 to {MAX_PRIORITY}")
    if not 0 < ttl_seconds <= MAX_TTL_SECONDS:
        raise ValueError(f"the time to live must be 1 to {MAX_TTL_SECONDS} seconds")
    clock = clock or SystemClock()
    claims: dict[str, object] = {
        "tenant": tenant,
        "sub": user,
        "scopes": " ".join(dict.fromkeys(words)),
        "max_priority": max_priority,
    }
    with locked(home) as folder:  # so that a rotation knows the last token of the key it replaces
        key = create_missing(home, folder, clock)
        note_expiry(folder, clock.now().timestamp() + ttl_seconds)
    return sign(key, claims, ttl_seconds=ttl_seconds, clock=clock)


def sign(
    key: ec.EllipticCurvePrivateKey,
    claims: Mapping[str, object],
    *,
    ttl_seconds: int,
    clock: Clock,
) -> str:
    """Signs claims with a key, for this mesh and from now on."""
    now = clock.now()
    return jwt.encode(
        {
            "iss": ISSUER,
            "aud": AUDIENCE,
            **claims,
            "iat": now,
            "exp": now + timedelta(seconds=ttl_seconds),
        },
        key,
        algorithm=ALGORITHM,
        headers={"kid": public_jwk(key)["kid"]},
    )


def _check_scope(scope: str) -> None:
    if scope == "admin":
        raise ValueError(
            "the scope 'admin' was split; it must be those of registry, router, billing and "
            "operator that are needed"
        )
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}; a scope must be one of {', '.join(SCOPES)}")
