"""Hashes in the place of inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.telemetry.hashing import InputHasher

KEY = b"0123456789abcdef0123456789abcdef"


def test_equal_inputs_have_equal_hashes() -> None:
    """Also across processes and releases: logs of last year can be compared."""
    hasher = InputHasher(KEY)
    assert hasher.hash("a prompt") == InputHasher(KEY).hash(b"a prompt")
    assert hasher.hash("a", "b") == "40c19c72032b5566cef9196fd740651d"


def test_another_key_gives_other_hashes() -> None:
    """Without the key, guessed inputs cannot be confirmed."""
    assert InputHasher(KEY).hash("a") != InputHasher(KEY[::-1]).hash("a")


@given(st.lists(st.text(), max_size=4), st.lists(st.text(), max_size=4))
def test_parts_are_kept_apart(one: list[str], other: list[str]) -> None:
    """Different messages never hash alike because they join to the same text."""
    hasher = InputHasher(KEY)
    assert (hasher.hash(*one) == hasher.hash(*other)) == (one == other)


def test_hashing_leaves_the_hasher_as_it_was() -> None:
    """One hasher serves all requests."""
    hasher = InputHasher(KEY)
    assert hasher.hash("a") == hasher.hash("a")


def test_the_key_is_all_of_the_file(tmp_path: Path) -> None:
    """No byte of it is taken for white space."""
    path = tmp_path / "input-hash.key"
    path.write_bytes(KEY + b"\n")
    assert InputHasher.from_file(path).hash("a") == InputHasher(KEY + b"\n").hash("a")


def test_uses_are_kept_apart() -> None:
    """What one use hashes, no other use can produce; each is the same in every process."""
    hasher = InputHasher(KEY)
    salts = hasher.derived("salts")
    assert salts.hash("a") == InputHasher(KEY).derived("salts").hash("a")
    assert len({each.hash("a") for each in (hasher, salts, hasher.derived("others"))}) == 3
    texts = ["salts", "tenant", "a"]
    assert salts.hash("a") not in {hasher.hash(*texts[start:]) for start in range(3)}


def test_a_short_key_is_refused(tmp_path: Path) -> None:
    """An empty key file must not turn the hash into one that anybody can compute."""
    path = tmp_path / "input-hash.key"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="fewer than"):
        InputHasher.from_file(path)
