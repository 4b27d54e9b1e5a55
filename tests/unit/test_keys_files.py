"""The keys of a mesh are created once, atomically, and readable by their owner only."""

from __future__ import annotations

import json
import multiprocessing
import stat
from pathlib import Path

import pytest

from deploy.keys import KeyFileError, ensure_keys, input_hash_key_path, jwks_path, keys_dir


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _ensure_and_read(home: Path, barrier, results) -> None:
    barrier.wait()
    ensure_keys(home)
    results.put({path.name: path.read_bytes() for path in keys_dir(home).glob("[!.]*")})


def test_keys_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    """Other users of the machine can neither sign tokens nor compute the hashes of inputs."""
    ensure_keys(tmp_path)
    assert _mode(keys_dir(tmp_path)) == 0o700
    assert _mode(keys_dir(tmp_path) / "edge.pem") == 0o600
    assert _mode(input_hash_key_path(tmp_path)) == 0o600
    assert len(bytes.fromhex(input_hash_key_path(tmp_path).read_text())) == 32


def test_the_public_file_holds_no_private_part(tmp_path: Path) -> None:
    """With what the edge reads it can verify tokens but not sign them."""
    ensure_keys(tmp_path)
    (key,) = json.loads(jwks_path(tmp_path).read_bytes())["keys"]
    assert key["alg"] == "ES256"
    assert set(key) == {"kty", "crv", "x", "y", "alg", "use", "kid"}


def test_a_second_start_keeps_the_keys(tmp_path: Path) -> None:
    """Tokens and hashes stay valid over restarts."""
    ensure_keys(tmp_path)
    before = {path: path.read_bytes() for path in keys_dir(tmp_path).iterdir()}
    ensure_keys(tmp_path)
    assert {path: path.read_bytes() for path in keys_dir(tmp_path).iterdir()} == before


def test_processes_that_start_at_once_agree_on_the_keys(tmp_path: Path) -> None:
    """Commands that create the keys concurrently all sign with the same key."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [
        context.Process(target=_ensure_and_read, args=(tmp_path, barrier, results))
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    seen = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert seen == [seen[0]] * 4
    names = {path.name for path in keys_dir(tmp_path).iterdir()}
    assert names == {*seen[0], ".lock", "last-expiry"}  # no drafts are left


def test_a_lost_public_file_is_created_again_from_the_key(tmp_path: Path) -> None:
    """With a deleted or stale `jwks.json` tokens stay valid."""
    ensure_keys(tmp_path)
    good = jwks_path(tmp_path).read_bytes()
    jwks_path(tmp_path).write_text("{}")
    ensure_keys(tmp_path)
    assert jwks_path(tmp_path).read_bytes() == good


@pytest.mark.parametrize(
    ("content", "mode", "complaint"),
    [(b"garbage", 0o600, "invalid PEM private key"), (None, 0o640, "other users can read it")],
)
def test_a_key_that_cannot_be_trusted_is_refused_by_name(
    tmp_path: Path, content: bytes | None, mode: int, complaint: str
) -> None:
    """The message names the file and what is wrong with it."""
    ensure_keys(tmp_path)
    path = keys_dir(tmp_path) / "edge.pem"
    path.write_bytes(path.read_bytes() if content is None else content)
    path.chmod(mode)
    with pytest.raises(KeyFileError, match=rf"edge\.pem: {complaint}"):
        ensure_keys(tmp_path)


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    """The message says that a file has the path of `HEADRACE_HOME`."""
    home = tmp_path / "home"
    home.write_text("in the way")
    with pytest.raises(KeyFileError, match="home: cannot create the keys"):
        ensure_keys(home)
