"""The key that signs tokens is replaced without a token that stops working before its time."""

from __future__ import annotations

import itertools
import json
import os
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import jwt
import pytest
from typing_extensions import override

from deploy.errors import CliError
from deploy.keys import jwks_path, keys_dir, mint_token, rotate, signing_keys
from deploy.keys.rotation import MAX_RETIRED_KEYS
from deploy.keys.tokens import MAX_TTL_SECONDS
from libs.clock import SystemClock

HOUR_SECONDS = 3600


class MovedClock(SystemClock):
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    @override
    def now(self) -> datetime:
        return datetime.now(UTC) + self.ahead


def accepted_at_once(_token: str) -> None:
    """An edge that knows every key."""


def verifies(home: Path, token: str) -> bool:
    """Returns whether the public file has the token's key, as the edge finds it."""
    keys = {key["kid"]: jwt.PyJWK(key) for key in json.loads(jwks_path(home).read_bytes())["keys"]}
    key = keys.get(jwt.get_unverified_header(token)["kid"])
    if key is None:
        return False
    claims = jwt.decode(
        token, key, algorithms=["ES256"], audience="headrace", options={"verify_exp": False}
    )
    return bool(claims)


def minted(home: Path, **settings: Any) -> str:
    return mint_token(home, tenant="acme", user="ann", **settings)


def test_the_new_key_signs_and_the_old_one_still_verifies(tmp_path: Path) -> None:
    """Until the last token of the old one has expired, and not much longer."""
    clock = MovedClock()
    old = minted(tmp_path, ttl_seconds=HOUR_SECONDS, clock=clock)
    current, retired = rotate(tmp_path, introduce=accepted_at_once, clock=clock)
    new = minted(tmp_path, clock=clock)

    assert verifies(tmp_path, old)
    assert verifies(tmp_path, new)
    assert [current.state, retired.state] == ["signs", "retired"]
    assert jwt.get_unverified_header(new)["kid"] == current.id
    assert jwt.get_unverified_header(old)["kid"] == retired.id
    clock.ahead = timedelta(hours=1)
    assert retired.expires is not None
    assert clock.now() <= retired.expires <= clock.now() + timedelta(hours=1)
    clock.ahead = timedelta(hours=2, minutes=1)
    minted(tmp_path, clock=clock)
    assert not verifies(tmp_path, old)
    assert verifies(tmp_path, new)


def test_the_edge_knows_the_new_key_before_it_signs(tmp_path: Path) -> None:
    """While the edge does not accept it, the old one signs; then nothing is lost."""
    old = minted(tmp_path)
    kid = jwt.get_unverified_header(old)["kid"]
    seen = []

    def edge(token: str) -> None:
        seen.append(verifies(tmp_path, token))
        raise CliError("the edge does not answer")

    with pytest.raises(CliError, match="does not answer"):
        rotate(tmp_path, introduce=edge)
    assert seen == [True]
    assert jwt.get_unverified_header(minted(tmp_path))["kid"] == kid
    assert [key.state for key in signing_keys(tmp_path)] == ["signs", "next"]
    (_, waiting) = signing_keys(tmp_path)

    current, retired = rotate(tmp_path, introduce=accepted_at_once)
    assert (current.id, retired.id) == (waiting.id, kid)


def test_now_ends_all_earlier_tokens(tmp_path: Path) -> None:
    """Also those of keys that were replaced before, and a key that never signed."""
    tokens = [minted(tmp_path)]
    rotate(tmp_path, introduce=accepted_at_once)
    tokens.append(minted(tmp_path))
    with pytest.raises(CliError):
        rotate(tmp_path, introduce=_fail)
    left_over = (keys_dir(tmp_path) / "edge.next.pem").read_bytes()

    (current,) = rotate(tmp_path, introduce=accepted_at_once, revoke=True)
    assert [verifies(tmp_path, token) for token in tokens] == [False, False]
    assert (keys_dir(tmp_path) / "edge.pem").read_bytes() != left_over
    assert verifies(tmp_path, minted(tmp_path))
    assert current.state == "signs"


def test_a_key_of_an_earlier_version_verifies_for_the_longest_life_of_a_token(
    tmp_path: Path,
) -> None:
    """Nobody recorded when its last token expires."""
    old = minted(tmp_path)
    (keys_dir(tmp_path) / "last-expiry").unlink()
    _, retired = rotate(tmp_path, introduce=accepted_at_once)
    assert verifies(tmp_path, old)
    assert retired.expires is not None
    assert retired.expires > datetime.now(UTC) + timedelta(seconds=MAX_TTL_SECONDS - 60)


def test_replaced_keys_have_a_limit(tmp_path: Path) -> None:
    """The message says what to do."""
    for _ in range(MAX_RETIRED_KEYS):
        minted(tmp_path)
        rotate(tmp_path, introduce=accepted_at_once)
    with pytest.raises(CliError, match="or end them with --now"):
        rotate(tmp_path, introduce=accepted_at_once)
    assert len(signing_keys(tmp_path)) == MAX_RETIRED_KEYS + 1


def test_only_the_owner_can_read_the_files(tmp_path: Path) -> None:
    """During and after a rotation."""
    modes: set[int] = set()

    def look(_token: str) -> None:
        modes.update(stat.S_IMODE(path.stat().st_mode) for path in keys_dir(tmp_path).iterdir())

    minted(tmp_path)
    rotate(tmp_path, introduce=look)
    look("")
    assert modes == {0o600}
    assert not (keys_dir(tmp_path) / "edge.next.pem").exists()


@pytest.mark.parametrize("revoke", [False, True])
def test_a_rotation_that_is_killed_anywhere_leaves_keys_that_work(
    tmp_path: Path, revoke: bool
) -> None:
    """At each write to disk: old tokens verify, new ones can be signed, and it can be repeated."""
    for number in itertools.count():
        home = tmp_path / str(number)
        tokens = [minted(home)]
        ended = _in_child(partial(_killed_at, home, number, revoke=revoke))
        tokens.append(minted(home))
        assert verifies(home, tokens[1])
        assert revoke or verifies(home, tokens[0])
        rotate(home, introduce=accepted_at_once, revoke=revoke)
        assert [verifies(home, token) for token in tokens] == [not revoke, not revoke]
        assert verifies(home, minted(home))
        if ended:
            break
    assert number > 6, "the rotation writes less often than it must"


def _killed_at(home: Path, number: int, *, revoke: bool) -> None:
    """Rotates the keys, and ends this process at a write to disk."""
    calls = itertools.count()
    fsync = os.fsync

    def count(descriptor: Any) -> None:
        if next(calls) == number:
            os._exit(1)
        fsync(descriptor)

    os.fsync = count  # type: ignore[assignment]  # in a process of its own
    rotate(home, introduce=accepted_at_once, revoke=revoke)


def _in_child(work: Callable[[], None]) -> bool:
    """Runs work in a process of its own; returns whether it came to its end."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _fail(_token: str) -> None:
    raise CliError("the edge does not answer")
