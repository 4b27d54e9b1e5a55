"""Starts and stops all processes of a mesh, and deploys the bundled models on it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import psutil

from deploy import binaries
from deploy.client.bundled import deploy_bundled_models
from deploy.client.deployer import DEPLOY_SCOPES, DeployProgress
from deploy.errors import CliError
from deploy.local import supervisor
from deploy.local.configuration import write_configurations
from deploy.local.edge import connect
from deploy.local.layout import Layout
from deploy.local.ports import EDGE, choose_ports, port_names, read_ports, replicas
from deploy.local.processes import ProcessSpec, mesh_processes
from deploy.local.readiness import wait_until_ready
from deploy.local.session import kill_members, mesh_members
from deploy.triton.command import remove_shared_memory

# What `start` runs besides Python.
_PROGRAMS = ("envoy", "nats-server", "tritonserver")
# Edge, services, backends: the groups are stopped one after the other, each with its own limit.
SHUTDOWN_SECONDS = 3 * supervisor.STOP_WAIT_SECONDS + 5
# For the descendants of stopped processes, which usually end by themselves, before they are killed.
DESCENDANTS_SECONDS = 1.0


class StartProgress(Protocol):
    """Callbacks for the progress of a start."""

    def starting(self, names: list[str]) -> None:
        """Called with the processes that are waited for."""

    def ready(self, name: str) -> None:
        """Called when a process is ready."""


@dataclass(frozen=True, kw_only=True)
class StopResult:
    """What `stop` did: how many processes ended, and how many of these it had to kill."""

    process_count: int
    killed_count: int


def start(layout: Layout, progress: StartProgress) -> list[ProcessSpec]:
    """Starts the mesh, or its missing processes, and returns all of them when they are ready.

    A mesh that runs with other settings is restarted.

    Raises:
        CliError: it cannot start; the message says why.
    """
    if any(character.isspace() for character in str(layout.home)):
        raise CliError(  # Triton's Python backend starts its processes with an unquoted path
            "Triton cannot run models in a folder whose path has a space; "
            f"set HEADRACE_HOME to another one: {layout.home}"
        )
    layout.edge.check()
    binaries.check(_PROGRAMS)
    layout.make_folders()
    with _private_files(), _start_lock(layout):
        processes = _running_with_current_settings(layout)
        if processes is not None:
            supervisor.start_stopped(layout)
        else:
            stop(layout)
            ports = choose_ports(layout)
            write_configurations(layout, ports)
            processes = mesh_processes(layout, ports)
            supervisor.start(layout, supervisor.render(layout, processes))
    progress.starting([process.name for process in processes])
    wait_until_ready(layout, processes, on_ready=progress.ready)
    return processes


def deploy_models(layout: Layout, progress: DeployProgress) -> None:
    """Deploys the bundled models on a mesh that runs, and returns when they answer.

    Raises:
        CliError: see `deploy_bundled_models`.
    """
    with (
        _private_files(),
        connect(layout, tenant="headrace", user="operator", scopes=DEPLOY_SCOPES) as edge,
    ):
        deploy_bundled_models(edge, home=layout.home, progress=progress)


def stop(layout: Layout) -> StopResult:
    """Stops every process of the mesh, also those that a killed supervisor left running."""
    supervisor_pid = supervisor.record(layout) if supervisor.is_running(layout) else None
    members = mesh_members(layout)
    if supervisor_pid is not None:
        supervisor.request_shutdown(layout)
        leaders = [process for process in members if process.pid == supervisor_pid]
        psutil.wait_procs(leaders, timeout=SHUTDOWN_SECONDS)
        psutil.wait_procs(members, timeout=DESCENDANTS_SECONDS)
    killed_count = kill_members(layout)
    for backend in replicas(read_ports(layout), "triton"):
        remove_shared_memory(home=layout.home, backend_id=backend)
    return StopResult(process_count=len(members), killed_count=killed_count)


def _running_with_current_settings(layout: Layout) -> list[ProcessSpec] | None:
    """Returns the processes of the mesh, or None if it must be (re)started."""
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
def _private_files() -> Iterator[None]:
    """Makes files that are created in the block readable by their owner only."""
    before = os.umask(supervisor.PRIVATE_UMASK)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def _start_lock(layout: Layout) -> Iterator[None]:
    """Lets only one `headrace up` at a time change the mesh of a folder."""
    with (layout.run / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
