"""Starts and stops a whole mesh."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import psutil

from deploy.errors import CliError
from deploy.local import supervisor
from deploy.local.layout import Layout
from deploy.local.ports import EDGE, keep_ports, port_names, read_ports, replicas
from deploy.local.processes import ProcessSpec, mesh_processes, write_configurations
from deploy.local.readiness import wait_until_ready
from deploy.local.session import end_members, mesh_members
from deploy.triton import run

# Edge, services, backends, each with its `STOP_WAIT_SECONDS`, one after the other.
SHUTDOWN_SECONDS = 3 * supervisor.STOP_WAIT_SECONDS + 5
# What the ended processes started and left behind ends by itself soon, or is killed.
LINGER_SECONDS = 1.0


class Progress(Protocol):
    """Hears how the start goes."""

    def starting(self, names: list[str]) -> None:
        """These processes are being waited for."""

    def ready(self, name: str) -> None:
        """This one is ready."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What `stop` did."""

    process_count: int
    killed_count: int


def start(layout: Layout, progress: Progress) -> list[ProcessSpec]:
    """Starts the mesh, or what is missing of it, and returns its processes when all are ready.

    A mesh that runs with other settings is started anew.

    Raises:
        CannotRun: it cannot start; the message says why.
    """
    layout.make_folders()
    with _alone(layout):
        processes = _running_as_wanted(layout)
        if processes is not None:
            supervisor.start_stopped(layout)
        else:
            stop(layout)
            processes = _configured(layout)
            supervisor.start(layout, supervisor.render(layout, processes))
    progress.starting([process.name for process in processes])
    wait_until_ready(layout, processes, on_ready=progress.ready)
    return processes


def stop(layout: Layout) -> Ended:
    """Ends every process of the mesh, also those whose supervisor was killed."""
    supervisor_pid = supervisor.record(layout) if supervisor.is_running(layout) else None
    members = mesh_members(layout)
    if supervisor_pid is not None:
        supervisor.request_shutdown(layout)
        leaders = [process for process in members if process.pid == supervisor_pid]
        psutil.wait_procs(leaders, timeout=SHUTDOWN_SECONDS)
        psutil.wait_procs(members, timeout=LINGER_SECONDS)
    killed_count = end_members(layout)
    for backend in replicas(read_ports(layout), "triton"):
        run.remove_shared_memory(home=layout.home, backend_id=backend)
    return Ended(process_count=len(members), killed_count=killed_count)


def _configured(layout: Layout) -> list[ProcessSpec]:
    ports = keep_ports(layout)
    try:
        write_configurations(layout, ports)
    except ValueError as error:
        raise CliError(str(error)) from error
    return mesh_processes(layout, ports)


def _running_as_wanted(layout: Layout) -> list[ProcessSpec] | None:
    ports = read_ports(layout)
    if not ports or not supervisor.is_running(layout):
        return None
    if layout.edge_port not in (None, ports[EDGE]) or set(ports) != set(port_names(layout)):
        return None
    processes = mesh_processes(layout, ports)
    config = layout.run / "supervisord.conf"
    if config.read_text() != supervisor.render(layout, processes):
        return None
    return processes


@contextmanager
def _alone(layout: Layout) -> Iterator[None]:
    """Lets one `up` at a time change the mesh of a folder."""
    with (layout.run / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
