"""The supervisor of one mesh: supervisord, controlled by a rendered file and a Unix socket."""

from __future__ import annotations

import re
import resource
import shlex
import subprocess
import sys
import xmlrpc.client
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from supervisor.xmlrpc import SupervisorTransport  # type: ignore[import-untyped]  # ships none

from deploy.errors import CliError
from deploy.host import REPOSITORY
from deploy.local.layout import Layout
from deploy.local.processes import DRAIN_SECONDS, ProcessSpec, system_environment
from deploy.local.session import record_session

# A process that runs this long counts as started, and is restarted immediately when it ends.
START_SECONDS = 1
# One that ends earlier is restarted after 1, 2, 3, ... seconds: half an hour with 60 retries.
START_RETRIES = 60
STOP_WAIT_SECONDS = DRAIN_SECONDS + 5
LOG_BYTES = 10 * 1024 * 1024
LOG_BACKUPS = 2
OPEN_FILES = 16_384
# Files of the mesh are for its user only, also if the folder's permissions allow others.
PRIVATE_UMASK = 0o077
# A core dump would have prompts, keys and tokens. The shell sets the limit, not a function between
# fork and exec: with one, Python really forks, which fails while other threads use gRPC.
_WITHOUT_CORE_DUMPS = ("/bin/sh", "-c", 'ulimit -c 0 && exec "$@"', "sh")
# supervisord stops the group with the highest priority first.
_GROUP_PRIORITIES = {"backends": 1, "services": 2, "edge": 3}
_RUNNING_SUPERVISOR_STATE = 1
_ENDS_VALUE = re.compile(r"\n|\s[;#]")  # a line break or the start of a comment


@dataclass(frozen=True, kw_only=True)
class ProcessState:
    """The supervisor's state of one process.

    Attributes:
        state: `RUNNING`, `STARTING`, `BACKOFF`, `STOPPED`, `EXITED`, `FATAL` and so on.
        pid: 0 if the process does not run.
    """

    name: str
    state: str
    pid: int


def render(layout: Layout, processes: Sequence[ProcessSpec]) -> str:
    """Returns supervisord's configuration."""
    sections: list[tuple[str, Mapping[str, object]]] = [
        ("unix_http_server", {"file": layout.socket, "chmod": "0700"}),
        (
            "supervisord",
            {
                "pidfile": layout.run / "supervisord.pid",
                "logfile": layout.logs / "supervisord.log",
                "logfile_maxbytes": LOG_BYTES,
                "logfile_backups": LOG_BACKUPS,
                "childlogdir": layout.logs,
                "directory": REPOSITORY,
                "minfds": _open_files(),
                "umask": f"{PRIVATE_UMASK:03o}",
            },
        ),
        (
            "rpcinterface:supervisor",
            {"supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"},
        ),
        *((f"program:{process.name}", _program(layout, process)) for process in processes),
        *_groups(processes),
    ]
    return "\n".join(f"[{name}]\n{_lines(values)}" for name, values in sections)


def start(layout: Layout, config: str) -> None:
    """Starts the supervisor, which starts all processes, and returns when it answers.

    Raises:
        CliError: it does not start.
    """
    path = layout.run / "supervisord.conf"
    path.write_text(config)
    layout.socket.unlink(missing_ok=True)
    command = [
        *_WITHOUT_CORE_DUMPS, sys.executable, "-m", "supervisor.supervisord", "-c", str(path)
    ]  # fmt: skip
    # HEADRACE_HOME shows which mesh the process belongs to; `session` and the installer read it.
    environment = system_environment() | {"HEADRACE_HOME": str(layout.home)}
    # It returns when the socket is open and the process runs in the background.
    done = subprocess.run(  # noqa: S603 - supervisord of this environment
        command,
        env=environment,
        cwd=REPOSITORY,
        umask=PRIVATE_UMASK,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise CliError(f"the supervisor does not start: {(done.stderr or done.stdout).strip()}")
    record(layout)


def record(layout: Layout) -> int:
    """Records the session that the supervisor leads and returns its process id."""
    pid = int(_call(layout, "getPID"))
    record_session(layout, pid)
    return pid


def is_running(layout: Layout) -> bool:
    """Returns whether the mesh's supervisor answers."""
    try:
        state = _call(layout, "getState")
    except (OSError, xmlrpc.client.Error):
        return False
    return bool(state["statecode"] == _RUNNING_SUPERVISOR_STATE)


def process_states(layout: Layout) -> Mapping[str, ProcessState]:
    """Returns the states of the processes by name; empty if no supervisor answers."""
    try:
        infos = _call(layout, "getAllProcessInfo")
    except (OSError, xmlrpc.client.Error):
        return {}
    return {
        info["name"]: ProcessState(name=info["name"], state=info["statename"], pid=info["pid"])
        for info in infos
    }


def start_stopped(layout: Layout) -> None:
    """Starts the processes that were stopped or that the supervisor has given up."""
    infos = _call(layout, "getAllProcessInfo")
    for info in infos:
        if info["statename"] in ("STOPPED", "EXITED", "FATAL"):
            _call(layout, "startProcess", f"{info['group']}:{info['name']}", False)


def request_shutdown(layout: Layout) -> None:
    """Makes the supervisor stop all processes, group by group, and then itself."""
    _call(layout, "shutdown")


def _call(layout: Layout, method: str, *arguments: Any) -> Any:
    """Calls supervisord's XML-RPC interface."""
    transport = SupervisorTransport(serverurl=f"unix://{layout.socket}")
    # The URL is not used: the transport connects to the socket.
    with xmlrpc.client.ServerProxy("http://localhost", transport=transport) as proxy:
        return getattr(proxy.supervisor, method)(*arguments)


def _open_files() -> int:
    """Returns the limit of open files of each process; one stream can take three connections."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)


def _program(layout: Layout, process: ProcessSpec) -> Mapping[str, object]:
    environment = ",".join(
        f"{key}={_quoted(value)}" for key, value in sorted(process.environment.items())
    )
    return {
        "command": shlex.join(process.argv),
        "environment": environment,
        "directory": REPOSITORY,
        "autostart": "true",
        "autorestart": "true",
        "startsecs": START_SECONDS,
        "startretries": START_RETRIES,
        "stopsignal": "TERM",
        "stopwaitsecs": STOP_WAIT_SECONDS,
        # The descendants of a process must not outlive it.
        "killasgroup": "true",
        "redirect_stderr": "true",
        "stdout_logfile": layout.logs / f"{process.name}.log",
        "stdout_logfile_maxbytes": LOG_BYTES,
        "stdout_logfile_backups": LOG_BACKUPS,
    }


def _groups(processes: Sequence[ProcessSpec]) -> Iterable[tuple[str, Mapping[str, object]]]:
    for group, priority in _GROUP_PRIORITIES.items():
        names = ",".join(process.name for process in processes if process.group == group)
        yield f"group:{group}", {"programs": names, "priority": priority}


def _lines(values: Mapping[str, object]) -> str:
    lines = [f"{key}={value}" for key, value in values.items()]
    for line in lines:
        if _ENDS_VALUE.search(line):
            raise CliError(
                f"a setting must not have a line break, or ; or # after a space: {line!r}"
            )
    # supervisord would expand what follows a single percent sign.
    return "".join(f"{line}\n".replace("%", "%%") for line in lines)


def _quoted(value: str) -> str:
    if '"' in value:
        raise CliError(f"a setting must not have a double quote: {value!r}")
    return f'"{value}"'
