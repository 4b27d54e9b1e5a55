"""The sandbox of models: its settings, and what is said where the kernel has not all of it."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.triton import confinement, sandbox
from deploy.triton.sandbox import SandboxError, sandbox_of

TRITON = Path(confinement.__file__).parent


def of(folder: Path, **environment: str) -> sandbox.Sandbox | None:
    return sandbox_of(folder, readable=[], listen_ports=[1], environment=environment)


@pytest.fixture
def landlock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that has all, and root."""
    monkeypatch.setattr(confinement, "landlock_version", lambda: 7)
    monkeypatch.setattr(confinement, "seccomp_is_available", lambda: True)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.delenv(sandbox.MODE_VARIABLE, raising=False)


@pytest.mark.usefixtures("landlock")
def test_each_triton_has_a_user_of_its_own(tmp_path):
    """The first number is a setting."""
    assert [of(tmp_path / f"triton-{n}").user_id for n in range(3)] == [65300, 65301, 65302]  # type: ignore[union-attr]  # it is on
    made = of(tmp_path / "triton-1", HEADRACE_TRITON_USER="70000")
    assert made is not None
    assert made.user_id == 70001


@pytest.mark.usefixtures("landlock")
def test_the_policy_of_stubs_and_the_folder_for_temporary_files_are_in_the_environment(tmp_path):
    """Models find the folder where libraries look for one."""
    made = of(tmp_path / "triton-0")
    assert made is not None
    scratch = str(tmp_path / "triton-0" / "tmp")
    environment = made.environment()
    assert (environment["HOME"], environment["TMPDIR"]) == (scratch, scratch)
    policy = json.loads(environment[sandbox.POLICY_VARIABLE])
    assert policy["scratch"] == scratch in policy["writable"]
    assert len(set(policy["engine_ports"])) == sandbox.ENGINE_PORTS


@pytest.mark.usefixtures("landlock")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        (sandbox.MODE_VARIABLE, "maybe"),
        (sandbox.USER_VARIABLE, "nobody"),
        (sandbox.USER_VARIABLE, "0"),
        (sandbox.USER_VARIABLE, "4294967295"),
    ],
)
def test_a_wrong_setting_is_refused(tmp_path, name, value):
    """With its name."""
    with pytest.raises(SandboxError, match=name):
        of(tmp_path / "triton-0", **{name: value})


@pytest.mark.usefixtures("landlock")
def test_a_user_with_an_account_is_refused(tmp_path):
    """Its files would be the models'."""
    account = next(each for each in pwd.getpwall() if each.pw_uid)
    with pytest.raises(SandboxError, match=account.pw_name):
        of(tmp_path / "triton-0", HEADRACE_TRITON_USER=str(account.pw_uid))


@pytest.mark.usefixtures("landlock")
def test_without_landlock_it_is_refused_or_warned_of(tmp_path, monkeypatch):
    """As the operator wants."""
    assert sandbox.warning() == ""
    monkeypatch.setattr(confinement, "landlock_version", lambda: 3)
    assert "without: tcp, signals" in sandbox.warning()
    monkeypatch.setattr(confinement, "landlock_version", lambda: 0)
    assert "without a sandbox" in sandbox.warning()
    assert of(tmp_path / "triton-0") is None
    with pytest.raises(SandboxError, match="no Landlock"):
        of(tmp_path / "triton-0", HEADRACE_TRITON_SANDBOX="required")


@pytest.mark.usefixtures("landlock")
def test_it_can_be_switched_off(tmp_path, monkeypatch):
    """And then that is said."""
    assert of(tmp_path / "triton-0", HEADRACE_TRITON_SANDBOX="off") is None
    monkeypatch.setenv(sandbox.MODE_VARIABLE, "off")
    assert not any(sandbox.layers().values())
    assert "without a sandbox" in sandbox.warning()


def test_the_launcher_without_a_policy_only_executes_the_stub():
    """No sandbox, no restriction."""
    command = [sys.executable, "-IS", str(TRITON / "stub_launcher.py"), "/bin/echo", "a", "b"]
    environment = {"PATH": "/usr/bin"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == "a b\n"
