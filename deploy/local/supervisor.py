"""The supervisor of one mesh: supervisord, told by a rendered file and over a Unix socket."""

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

# A process that lives so long counts as started; one that ends later is started again at once.
START_SECONDS = 1
# One that ends earlier is started again after 1, 2, 3, ... seconds, for half an hour in all.
START_RETRIES = 60
STOP_WAIT_SECONDS = DRAIN_SECONDS + 5
LOG_BYTES = 10 * 1024 * 1024
LOG_BACKUPS = 2
OPEN_FILES = 16_384
# The order in which they end: supervisord takes the highest priority first.
_GROUP_PRIORITIES = {"backends": 1, "services": 2, "edge": 3}
_RUNNING_SUPERVISOR_STATE = 1
_CUT_SHORT = re.compile(r"\n|\s[;#]")  # where it begins a comment


@dataclass(frozen=True, kw_only=True)
class ProcessState:
    """What the supervisor knows of a process.

    Attributes:
        state: `RUNNING`, `STARTING`, `BACKOFF`, `STOPPED`, `EXITED`, `FATAL` and so on.
        pid: 0 where there is none.
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
        CannotRun: it does not start.
    """
    path = layout.run / "supervisord.conf"
    path.write_text(config)
    layout.socket.unlink(missing_ok=True)
    command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(path)]
    # HEADRACE_HOME marks it as this mesh's, for whoever looks at the process.
    environment = system_environment() | {"HEADRACE_HOME": str(layout.home)}
    # It returns when the socket is open and the process has gone into the background.
    done = subprocess.run(  # noqa: S603 - our own
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise CliError(f"the supervisor does not start: {(done.stderr or done.stdout).strip()}")
    record(layout)


def record(layout: Layout) -> int:
    """Writes down the session that the supervisor leads and returns its process id."""
    pid = int(_call(layout, "getPID"))
    record_session(layout, pid)
    return pid


def is_running(layout: Layout) -> bool:
    """Tells whether the mesh's supervisor answers."""
    try:
        state = _call(layout, "getState")
    except (OSError, xmlrpc.client.Error):
        return False
    return bool(state["statecode"] == _RUNNING_SUPERVISOR_STATE)


def process_states(layout: Layout) -> Mapping[str, ProcessState]:
    """Returns the states of the processes by name; empty where no supervisor answers."""
    try:
        infos = _call(layout, "getAllProcessInfo")
    except (OSError, xmlrpc.client.Error):
        return {}
    return {
        info["name"]: ProcessState(name=info["name"], state=info["statename"], pid=info["pid"])
        for info in infos
    }


def start_stopped(layout: Layout) -> None:
    """Starts the processes that the supervisor has given up or somebody has stopped."""
    infos = _call(layout, "getAllProcessInfo")
    for info in infos:
        if info["statename"] in ("STOPPED", "EXITED", "FATAL"):
            _call(layout, "startProcess", f"{info['group']}:{info['name']}", False)


def request_shutdown(layout: Layout) -> None:
    """Has the supervisor end all processes, group by group, and then itself."""
    _call(layout, "shutdown")


def _call(layout: Layout, method: str, *arguments: Any) -> Any:
    """Calls supervisord's XML-RPC interface."""
    transport = SupervisorTransport(serverurl=f"unix://{layout.socket}")
    # The address is not used: the transport has the socket's.
    with xmlrpc.client.ServerProxy("http://localhost", transport=transport) as proxy:
        return getattr(proxy.supervisor, method)(*arguments)


def _open_files() -> int:
    """Returns how many files each process may have open: of a stream, three are connections."""
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
        # What a process started must not outlive it.
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
        if _CUT_SHORT.search(line):
            raise CliError(
                f"supervisord cannot read a line break, or ; or # after a space: {line!r}"
            )
    # supervisord expands what follows a percent sign.
    return "".join(f"{line}\n".replace("%", "%%") for line in lines)


def _quoted(value: str) -> str:
    if '"' in value:
        raise CliError(f"supervisord cannot read a quote in a variable: {value!r}")
    return f'"{value}"'
