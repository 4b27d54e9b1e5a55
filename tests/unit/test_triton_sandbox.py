"""The sandbox of models: its settings, and what is said where the kernel has not all of it."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from deploy import host
from deploy.triton import command, confinement, sandbox
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
    words = [sys.executable, "-IS", str(TRITON / "stub_launcher.py"), "/bin/echo", "a", "b"]
    environment = {"PATH": "/usr/bin"}
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == "a b\n"


@pytest.mark.usefixtures("landlock")
def test_required_means_every_layer(tmp_path, monkeypatch):
    """Not the files alone."""
    assert of(tmp_path / "triton-0", HEADRACE_TRITON_SANDBOX="required") is not None
    monkeypatch.setattr(confinement, "landlock_version", lambda: 5)
    with pytest.raises(SandboxError, match="signals"):
        of(tmp_path / "triton-0", HEADRACE_TRITON_SANDBOX="required")
    monkeypatch.setattr(confinement, "landlock_version", lambda: 7)
    monkeypatch.setattr(confinement, "seccomp_is_available", lambda: False)
    with pytest.raises(SandboxError, match="unix_sockets"):
        of(tmp_path / "triton-0", HEADRACE_TRITON_SANDBOX="required")


def _prepare(scratch: Path) -> None:
    """Prepares a sandbox whose user stays."""
    made = sandbox.Sandbox(
        folder=scratch.parent,
        scratch=scratch,
        readable=[],
        private=[],
        sockets=[],
        listen_ports=[],
        engine_ports=[],
        user_id=None,
        restricts_files=False,
    )
    made.prepare()


def _call(child: Path, *, user: int | None) -> int:
    """Calls `_prepare` in a process of another user and returns its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if user is not None:
                os.setresuid(user, user, user)
            _prepare(child)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_what_a_model_left_stops_no_start():
    """Nor does it stay, where that can be removed."""
    user = 65533 if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        scratch = folder / "tmp"
        closed = scratch / "outer" / "inner"
        closed.mkdir(parents=True)
        (closed / "file").touch()
        if user is not None:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, user, user)
        for path in (closed, closed.parent):
            path.chmod(0)
        assert _call(scratch, user=user) == 0
        assert [path.name for path in folder.iterdir()] == ["tmp"]
        assert list(scratch.iterdir()) == []


def test_folders_of_any_depth_stop_no_start(tmp_path):
    """Removing them by recursion has an end."""
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    before = Path.cwd()
    try:
        os.chdir(scratch)
        for _ in range(1500):
            os.mkdir("d")  # noqa: PTH102  # the path is too long for one
            os.chdir("d")
        os.chdir(before)
        _prepare(scratch)
        assert [path.name for path in tmp_path.iterdir()] == ["tmp"]
        assert list(scratch.iterdir()) == []
    finally:
        os.chdir(before)
        subprocess.run(["/bin/rm", "-rf", str(scratch)], check=True)  # pytest cannot


def test_links_that_a_model_left_are_not_followed(tmp_path):
    """What they lead to stays."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    scratch = tmp_path / "triton" / "tmp"
    (scratch / "inner").mkdir(parents=True)
    (scratch / "link").symlink_to(kept)
    (scratch / "inner" / "link").symlink_to(kept)
    os.mkfifo(scratch / "inner" / "pipe")
    _prepare(scratch)
    assert [path.name for path in scratch.parent.iterdir()] == ["tmp"]
    assert (kept / "file").exists()


def test_foreign_names_in_shared_memory_stop_no_start(tmp_path, monkeypatch):
    """Any account may make them."""
    monkeypatch.setattr(command, "SHARED_MEMORY", tmp_path)
    prefix = command.region_prefix(tmp_path / "home" / "triton" / "triton-0")
    (tmp_path / f"{prefix}a").mkdir()
    (tmp_path / f"{prefix}b").symlink_to("nothing")
    region, other = tmp_path / f"{prefix}c", tmp_path / "other"
    for path in (region, other):
        path.touch()
    command.remove_shared_memory(home=tmp_path / "home", backend_id="triton-0")
    assert not region.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{prefix}a", f"{prefix}b", "other"]


def test_a_lock_that_a_model_replaced_stops_no_other_model(tmp_path):
    """A link is not followed and a pipe not waited for: the next port is taken."""
    ports = host.free_ports(4)
    aim = tmp_path / "aim"
    (tmp_path / f"engine-{ports[0]}.lock").symlink_to(aim)
    os.mkfifo(tmp_path / f"engine-{ports[1]}.lock")
    (tmp_path / f"engine-{ports[2]}.lock").mkdir()
    code = (
        "import pathlib, sys; sys.path.insert(0, sys.argv[1]); import stub_launcher as s;"
        "print(s._reserve_port([int(p) for p in sys.argv[3:]], pathlib.Path(sys.argv[2])))"
    )
    arguments = [str(TRITON), str(tmp_path), *map(str, ports)]
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    assert int(ran.stdout) == ports[3]
    assert not aim.exists()
