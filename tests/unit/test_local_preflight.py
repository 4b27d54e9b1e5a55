"""The checks before anything is downloaded."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import socket
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest

LOCAL = Path(__file__).parents[2] / "deploy" / "local"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, LOCAL / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


preflight = _load("preflight")
install = _load("install")


def test_this_machine_passes():
    """A machine that runs the tests can run a mesh."""
    assert preflight.platform_problems() == []
    path, problems = preflight.find_python()
    assert problems == []
    assert Path(path).exists()


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "aarch64")])
def test_another_platform_is_named(system: str, machine: str, monkeypatch: pytest.MonkeyPatch):
    """One line says what it is and what it should be."""
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)

    (problem,) = preflight.platform_problems()

    assert "needs Linux on x86-64" in problem
    assert f"{system} on {machine}" in problem


@pytest.mark.parametrize(
    ("libc", "message"),
    [("glibc 2.31", "this system has 2.31"), (None, "another C library"), ("glibc 2.35", None)],
)
def test_an_old_c_library_is_named(
    libc: str | None, message: str | None, monkeypatch: pytest.MonkeyPatch
):
    """The wheels need glibc 2.35; musl does not count."""
    monkeypatch.setattr(os, "confstr", lambda name: libc)

    problems = preflight.platform_problems()

    assert [message in problem for problem in problems] == ([True] if message else [])


def _python(
    folder: Path,
    name: str,
    *,
    version: str = "3.11",
    has_venv: bool = True,
    has_library: bool = True,
    seconds: float = 0.1,
) -> None:
    path = f"{folder}/there/{name}"
    answer = json.dumps([path, version, has_venv, has_library, seconds])
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\necho '{answer}'\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (("3.13", True, True), "it needs Python 3.11 or 3.12, but python3 is 3.13."),
        (("3.11", False, True), "has no venv module; install it (Debian: python3.11-venv)"),
        (("3.12", True, False), "has no shared library; install it (Debian: libpython3.12)"),
        (None, "put one on the PATH"),
    ],
)
def test_what_a_python_lacks_is_named(
    facts: tuple[str, bool, bool] | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """With the package to install."""
    if facts is not None:
        version, has_venv, has_library = facts
        _python(tmp_path, "python3", version=version, has_venv=has_venv, has_library=has_library)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PYTHON", raising=False)

    path, (problem,) = preflight.find_python()

    assert path is None
    assert message in problem


def test_the_first_python_that_fits_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An incomplete one does not hide a complete one."""
    _python(tmp_path, "python3.11", has_venv=False)
    _python(tmp_path, "python3.12", version="3.12")
    _python(tmp_path, "python3")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PYTHON", raising=False)

    assert preflight.find_python() == (f"{tmp_path}/there/python3.12", [])


@pytest.mark.parametrize(("seconds", "taken"), [(0.06, "second"), (0.09, "first")])
def test_a_python_that_is_clearly_faster_is_preferred(
    seconds: float, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Wherever on the PATH it is: with a Python without optimisation each request costs more."""
    folders = {name: tmp_path / name for name in ("first", "second")}
    _python(folders["first"], "python3.11")
    _python(folders["second"], "python3.11", seconds=seconds)
    _python(folders["second"], "python3.12", version="3.12", has_venv=False, seconds=0.01)
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, folders.values())))
    monkeypatch.delenv("PYTHON", raising=False)

    assert preflight.find_python() == (f"{folders[taken]}/there/python3.11", [])

    monkeypatch.setenv("PYTHON", str(folders["first"] / "python3.11"))
    assert preflight.find_python() == (f"{folders['first']}/there/python3.11", [])


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch):
    """The message says how much is needed."""
    usage = namedtuple("usage", "total used free")  # noqa: PYI024 - as the real one
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2, 1, 1024**3))

    (problem,) = preflight.disk_problems("/somewhere")

    assert problem == "it needs 3.0 GiB of free disk space, but /somewhere has 1.0 GiB."


def test_a_taken_port_is_named_before_anything_is_installed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """`make demo` prints one line and downloads nothing."""
    monkeypatch.setattr(install, "_is_current", lambda step: False)
    monkeypatch.setattr(install, "_install", lambda *step: pytest.fail("installed"))
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("HEADRACE_EDGE_PORT", str(port))

        assert install.main(["--edge-port", "services"]) == 1

    assert f"port {port} of 127.0.0.1 cannot be used" in capsys.readouterr().err


def test_a_current_environment_is_not_installed_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The second run reads the lock files only."""
    monkeypatch.setattr(install, "_is_current", lambda step: True)
    monkeypatch.setattr(preflight, "find_python", lambda: pytest.fail("searched for a Python"))

    assert install.main(["services", "triton", "models", "dev"]) == 0
    assert capsys.readouterr().out == ""
