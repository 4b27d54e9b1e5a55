"""Finds the processes of a mesh, whoever their parent is by now.

The supervisor begins a session, and all that it starts stays in that session. The session, with the
time it began, is written down, so that `down` ends exactly these processes, even if the supervisor
was killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import psutil

from deploy.local.layout import Layout

KILL_WAIT_SECONDS = 10.0


def record_session(layout: Layout, supervisor_pid: int) -> None:
    """Writes down the session that this supervisor leads."""
    began = psutil.Process(supervisor_pid).create_time()
    layout.session_file.write_text(json.dumps({"id": supervisor_pid, "create_time": began}))


def mesh_members(layout: Layout) -> Sequence[psutil.Process]:
    """Returns the living processes of the mesh."""
    try:
        session = json.loads(layout.session_file.read_text())
        identifier, began = int(session["id"]), float(session["create_time"])
    except (FileNotFoundError, ValueError, KeyError):
        return []
    members = [process for process in psutil.process_iter() if _is_in(process, identifier)]
    leader = next((process for process in members if process.pid == identifier), None)
    if leader is not None and leader.create_time() != began:
        return []  # the number was given to somebody else meanwhile
    return [process for process in members if _speaks_of(process, str(layout.home))]


def end_members(layout: Layout) -> int:
    """Kills what is left of the mesh and returns how many processes that were."""
    members = mesh_members(layout)
    for process in members:
        try:
            process.kill()  # checks the start time: never a process that got the pid later
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(members, timeout=KILL_WAIT_SECONDS)
    return len(members)


def _is_in(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def _speaks_of(process: psutil.Process, home: str) -> bool:
    """Tells whether the process was started with this folder, as each of ours is."""
    try:
        words = [*process.cmdline(), *process.environ().values()]
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
    return any(home in word for word in words)
