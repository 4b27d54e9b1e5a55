"""Programs are those that were reviewed, or the operator's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy import binaries, keys
from deploy.binaries import Binary, Digests, verify
from deploy.errors import CliError
from deploy.host import REPOSITORY
from deploy.local.layout import Layout
from deploy.local.ports import port_names
from deploy.local.processes import mesh_processes
from deploy.local.status import _version

_SETTING = "HEADRACE_TEST_BINARY"
_DIGEST = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # of "hello"


@pytest.fixture(name="repository")
def empty_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(binaries, "REPOSITORY", tmp_path)
    return tmp_path


def _binary(**changes: object) -> Binary:
    entry = {
        "name": "tool",
        "version": "1",
        "package": "tool-bin 1",
        "built_by": "its maker",
        "compare": "sha256sum",
        "files": {"lib/python3.*/tool": _DIGEST},
        "setting": _SETTING,
    }
    return Binary(**{**entry, **changes})  # type: ignore[arg-type]  # of a test


def _install(repository: Path, content: bytes = b"hello") -> Path:
    file = repository / "lib" / "python3.11" / "tool"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    file.chmod(0o755)
    return file


def test_what_is_installed_is_what_was_reviewed() -> None:
    """All programs of this checkout, every byte."""
    for found in verify(binaries.binaries(), Digests(None)):
        assert found.state in ("ok", "absent" if found.binary.optional else "ok"), found


def test_the_list_has_every_program_that_a_mesh_runs() -> None:
    """With the digests of all libraries that come with it."""
    listed = {binary.name: binary for binary in binaries.binaries()}
    assert {"envoy", "nats-server", "tritonserver"} <= set(listed)
    libraries = {
        str(path.relative_to(REPOSITORY)).replace("python3.11", "python3.*")
        for path in REPOSITORY.glob(".venv-triton/lib/python3.*/site-packages/*.libs/*.so*")
    }
    assert libraries <= set(listed["tritonserver"].files)


def test_optional_programs_may_be_absent_but_not_changed(repository: Path) -> None:
    """What only developers need is not installed for others."""
    binary = _binary(optional=True)
    assert verify([binary], Digests(None))[0].state == "absent"
    _install(repository, b"other")
    assert verify([binary], Digests(None))[0].state == "changed"


def test_a_changed_program_is_not_started(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says which, and what to do."""
    monkeypatch.setattr(binaries, "binaries", lambda: [_binary()])
    monkeypatch.setattr(binaries, "CACHE_FILE", repository / "cache")
    with pytest.raises(CliError, match="tool 1 from tool-bin 1 is not complete"):
        binaries.check(["tool"])
    _install(repository)
    binaries.check(["tool"])
    _install(repository, b"hullo")
    with pytest.raises(CliError, match="is not the program that was reviewed") as caught:
        binaries.check(["tool"])
    assert "make install" in str(caught.value)
    assert f"set {_SETTING}" in str(caught.value)


def test_a_program_of_the_operator_is_shown_but_not_compared(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the list needs to be installed then."""
    own = _install(repository, b"other")
    monkeypatch.setenv(_SETTING, str(own))
    binary = _binary(files={"nowhere": _DIGEST})
    (found,) = verify([binary], Digests(None))
    assert (found.state, list(found.digests)) == ("own", [str(own)])
    assert binary.program() == own
    monkeypatch.setenv(_SETTING, str(repository / "none"))
    assert verify([binary], Digests(None))[0].state == "missing"
    with pytest.raises(CliError, match="not installed"):
        binary.program()


def test_what_has_not_changed_is_not_read_again(repository: Path) -> None:
    """Also after a restart; a file with other times or another size is read."""
    file, cache = _install(repository), repository / "cache"
    verify([_binary()], Digests(cache))
    stored = json.loads(cache.read_text())
    stored[str(file)][1] = "from the cache"
    cache.write_text(json.dumps(stored))
    assert Digests(cache).of(file) == "from the cache"
    _install(repository, b"hello")
    assert Digests(cache).of(file) == _DIGEST


def test_a_broken_cache_is_replaced(repository: Path) -> None:
    """And one that cannot be written does no harm."""
    _install(repository)
    cache = repository / "cache"
    cache.write_text("{")
    assert verify([_binary()], Digests(cache))[0].state == "ok"
    assert json.loads(cache.read_text())
    assert verify([_binary()], Digests(repository / "none" / "cache"))[0].state == "ok"


def test_a_mesh_runs_the_operators_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of the process names it, and the status says so."""
    layout = Layout(home=tmp_path)
    keys.ensure_keys(tmp_path)
    own = tmp_path / "envoy"
    own.write_bytes(b"own")
    own.chmod(0o755)
    ports = {name: 20_000 + number for number, name in enumerate(port_names(layout))}
    for path, version in ((None, "1.40.0"), (own, "own")):
        if path:
            monkeypatch.setenv("HEADRACE_ENVOY_BINARY", str(path))
        (envoy,) = [each for each in mesh_processes(layout, ports) if each.name == "envoy"]
        assert (envoy.argv[0] == str(own)) == (path is not None)
        assert _version(layout, envoy) == version
