"""Finds the processes of a mesh, also those whose supervisor was killed.

The supervisor leads a session, and every process that it starts stays in this session. A file
records the session and its start time, so that `headrace down` stops exactly these processes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import psutil

from deploy.local.layout import Layout

KILL_WAIT_SECONDS = 10.0


def record_session(layout: Layout, supervisor_pid: int) -> None:
    """Records the session that this supervisor leads."""
    create_time = psutil.Process(supervisor_pid).create_time()
    layout.session_file.write_text(json.dumps({"id": supervisor_pid, "create_time": create_time}))


def mesh_members(layout: Layout) -> Sequence[psutil.Process]:
    """Returns the running processes of the mesh."""
    try:
        session = json.loads(layout.session_file.read_text())
        identifier, create_time = int(session["id"]), float(session["create_time"])
    except (FileNotFoundError, ValueError, KeyError):
        return []
    members = [process for process in psutil.process_iter() if _is_in(process, identifier)]
    leader = next((process for process in members if process.pid == identifier), None)
    if leader is not None and leader.create_time() != create_time:
        return []  # the number belongs to another session now
    return [process for process in members if _was_started_for(process, str(layout.home))]


def kill_members(layout: Layout) -> int:
    """Kills the processes of the mesh that still run and returns their number."""
    members = mesh_members(layout)
    for process in members:
        try:
            process.kill()  # checks the start time, so a process that reuses the pid is safe
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(members, timeout=KILL_WAIT_SECONDS)
    return len(members)


def _is_in(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def _was_started_for(process: psutil.Process, home: str) -> bool:
    """Returns whether a process names the mesh's folder in its arguments or environment.

    Every process of a mesh does. It guards against a session number that the system gave to
    another program after the leader had ended.
    """
    try:
        words = [*process.cmdline(), *process.environ().values()]
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
    return any(home in word for word in words)
