"""A real supervisord with small processes."""

from __future__ import annotations

import ast
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from deploy.errors import CliError
from deploy.local import supervisor
from deploy.local.layout import Layout
from deploy.local.lifecycle import stop
from deploy.local.processes import ProcessSpec
from deploy.local.readiness import wait_until_ready
from deploy.local.session import mesh_members

# Answers 200 at its port, starts a child, and prints its environment.
_SERVER = (
    "import http.server as s, os, subprocess, sys;"
    "subprocess.Popen(['sleep', '600']);"
    "print(dict(os.environ), flush=True);"
    "s.HTTPServer(('127.0.0.1', int(sys.argv[1])), s.SimpleHTTPRequestHandler).serve_forever()"
)


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[Layout]:
    layout = Layout(home=tmp_path)
    layout.make_folders()
    yield layout
    stop(layout)


@pytest.fixture
def server(layout: Layout) -> ProcessSpec:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ProcessSpec(
        name="server",
        group="services",
        argv=[sys.executable, "-c", _SERVER, str(port)],
        environment={"TEXT": "100 % 'so';#it is", "HEADRACE_HOME": str(layout.home)},
        health=f"http://127.0.0.1:{port}/",
        address=f"127.0.0.1:{port}",
    )


def _start(layout: Layout, *processes: ProcessSpec) -> None:
    supervisor.start(layout, supervisor.render(layout, processes))
    wait_until_ready(layout, processes, on_ready=lambda name: None)


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_files_are_private_and_there_are_no_core_dumps(layout: Layout, server: ProcessSpec):
    """Of every process of the mesh, whatever the caller's own settings are."""
    before = os.umask(0o022)
    try:
        _start(layout, server)
    finally:
        os.umask(before)

    status = Path(f"/proc/{supervisor.process_states(layout)['server'].pid}/status").read_text()
    limits = Path(f"/proc/{supervisor.process_states(layout)['server'].pid}/limits").read_text()
    assert "Umask:\t0077\n" in status
    assert re.search(r"Max core file size +0 +0 ", limits)
    for log in layout.logs.iterdir():
        assert log.stat().st_mode & 0o077 == 0, log


def test_a_process_has_exactly_its_environment(layout: Layout, server: ProcessSpec, monkeypatch):
    """Percent signs, quotes and semicolons are kept; the caller's variables are not passed on."""
    monkeypatch.setenv("SECRET_OF_THE_CALLER", "1")

    _start(layout, server)

    environment = ast.literal_eval((layout.logs / "server.log").read_text().splitlines()[0])
    assert environment["TEXT"] == server.environment["TEXT"]
    assert "SECRET_OF_THE_CALLER" not in environment


def test_a_killed_process_is_restarted(layout: Layout, server: ProcessSpec):
    """After kill -9 the supervisor starts it again within about a second."""
    _start(layout, server)
    time.sleep(supervisor.START_SECONDS)  # it counts as started from then on
    pid = supervisor.process_states(layout)["server"].pid

    os.kill(pid, signal.SIGKILL)

    def is_new() -> bool:
        state = supervisor.process_states(layout)["server"]
        return state.state == "RUNNING" and state.pid not in (0, pid)

    assert _wait(is_new, seconds=5.0)
    wait_until_ready(layout, [server], on_ready=lambda name: None)


def test_stop_leaves_no_process(layout: Layout, server: ProcessSpec):
    """The children of a process end too, and the socket does not answer any more."""
    _start(layout, server)
    members = mesh_members(layout)
    assert len(members) >= 3  # the supervisor, the server, its child

    result = stop(layout)

    assert result.process_count == len(members)
    assert not any(psutil.pid_exists(process.pid) and process.is_running() for process in members)
    assert not supervisor.is_running(layout)


def test_stop_finds_the_orphans_of_a_killed_supervisor(layout: Layout, server: ProcessSpec):
    """Without a supervisor the processes continue; `stop` still finds them."""
    _start(layout, server)
    supervisor = int((layout.run / "supervisord.pid").read_text())
    os.kill(supervisor, signal.SIGKILL)
    assert _wait(lambda: not psutil.pid_exists(supervisor), seconds=5.0)
    orphans = mesh_members(layout)
    assert orphans

    result = stop(layout)

    assert result.killed_count == len(orphans)
    assert not mesh_members(layout)


def test_stop_leaves_a_later_session_of_the_same_number_alone(layout: Layout):
    """After a reboot the recorded number may belong to another session."""
    command = [sys.executable, "-c", "import time; time.sleep(600)", str(layout.home)]
    with subprocess.Popen(command, start_new_session=True) as other:
        layout.session_file.write_text(f'{{"id": {other.pid}, "create_time": 1.0}}')
        try:
            assert stop(layout).process_count == 0
            assert other.poll() is None
        finally:
            other.kill()


def test_the_log_of_a_process_that_does_not_start_is_shown(
    layout: Layout, server: ProcessSpec, monkeypatch
):
    """The user sees why it does not start."""
    broken = ProcessSpec(
        name="broken",
        group="services",
        argv=[sys.executable, "-c", "raise SystemExit('the reason')"],
        health=server.health,
        address=server.address,
    )
    monkeypatch.setattr(supervisor, "START_RETRIES", 0)

    with pytest.raises(CliError, match=r"not ready: broken(.|\n)*the reason"):
        _start(layout, broken)


@pytest.mark.parametrize("value", ["a\n[program:other]", "a ; b", "a # b", 'a "b"'])
def test_a_setting_that_would_break_the_file_is_refused(
    layout: Layout, server: ProcessSpec, value: str
):
    """A value can neither add a line to the configuration nor be truncated by a comment."""
    process = replace(server, environment={"TEXT": value})

    with pytest.raises(CliError, match="a setting must not have"):
        supervisor.render(layout, [process])


def test_a_process_that_ends_twice_ends_the_start(layout: Layout, server: ProcessSpec):
    """At once, with what it printed, and only that of the process that failed."""
    code = "import time; time.sleep(1.2); raise SystemExit('the setting X is wrong')"
    broken = replace(server, name="broken", argv=[sys.executable, "-c", code])
    supervisor.start(layout, supervisor.render(layout, [broken]))
    started = time.monotonic()

    with pytest.raises(CliError, match="the setting X is wrong") as raised:
        wait_until_ready(layout, [broken], on_ready=lambda _name: None)

    assert time.monotonic() - started < 30
    assert str(raised.value).startswith("not ready: broken. ")
    assert "headrace down" in str(raised.value)


def test_a_supervisor_that_ends_ends_the_start(layout: Layout, server: ProcessSpec):
    """Nothing will become ready any more."""
    code = "import time; time.sleep(60)"
    quiet = replace(server, argv=[sys.executable, "-c", code])
    supervisor.start(layout, supervisor.render(layout, [quiet]))
    stop(layout)

    with pytest.raises(CliError, match="not ready: supervisord"):
        wait_until_ready(layout, [server], on_ready=lambda _name: None)
