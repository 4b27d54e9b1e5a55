"""Tokens name the caller, expire, and are signed by this mesh's key."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jwt
import pytest
from typing_extensions import override

from deploy.keys import jwks_path, mint_token
from libs.clock import SystemClock


class _PastClock(SystemClock):
    @override
    def now(self) -> datetime:
        return datetime(2020, 1, 1, tzinfo=UTC)


def _verified(home: Path, token: str) -> dict[str, Any]:
    """Verifies a token with the public file only, as the edge does."""
    keys = {key["kid"]: jwt.PyJWK(key) for key in json.loads(jwks_path(home).read_bytes())["keys"]}
    key = keys[jwt.get_unverified_header(token)["kid"]]
    return jwt.decode(token, key, algorithms=["ES256"], audience="headrace", issuer="headrace")


def test_a_token_carries_the_identity_and_verifies_with_the_public_file(tmp_path: Path) -> None:
    """The edge reads the same claims that the token was signed with."""
    token = mint_token(
        tmp_path, tenant="acme", user="ann", scopes=" infer  billing", ttl_seconds=60
    )
    claims = _verified(tmp_path, token)
    assert claims["exp"] - claims["iat"] == 60
    assert {key: claims[key] for key in ("sub", "tenant", "scopes")} == {
        "sub": "ann",
        "tenant": "acme",
        "scopes": "infer billing",
    }


def test_a_token_expires(tmp_path: Path) -> None:
    """A token of the past is refused."""
    token = mint_token(tmp_path, tenant="acme", user="ann", ttl_seconds=60, clock=_PastClock())
    with pytest.raises(jwt.ExpiredSignatureError):
        _verified(tmp_path, token)


def test_another_mesh_does_not_accept_the_token(tmp_path: Path) -> None:
    """Each mesh has its own key."""
    token = mint_token(tmp_path / "one", tenant="acme", user="ann")
    mint_token(tmp_path / "two", tenant="acme", user="ann")
    with pytest.raises(KeyError):
        _verified(tmp_path / "two", token)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tenant": ""},
        {"tenant": "acme\r\nx-headrace-scopes: registry"},
        {"user": "ann\u00e9"},
        {"user": "a" * 129},
        {"scopes": "infer \x00"},
        {"scopes": "infer,read"},
        {"scopes": "internal"},
        {"scopes": "infer admin"},
        {"ttl_seconds": 0},
        {"ttl_seconds": 10**9},
    ],
)
def test_a_claim_that_is_invalid_in_a_header_is_refused(
    tmp_path: Path, wrong: dict[str, Any]
) -> None:
    """Claims become headers: no line breaks, no unknown scopes, no tokens without an end."""
    with pytest.raises(ValueError, match=r"must be"):
        mint_token(tmp_path, **{"tenant": "acme", "user": "ann", **wrong})
