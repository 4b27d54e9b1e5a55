"""The state of a local mesh: its processes, and what is deployed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import grpc
import psutil
from tritonclient.grpc import service_pb2, service_pb2_grpc

from deploy import binaries
from deploy.client.registry import DeploymentStatus, Registry
from deploy.errors import CliError
from deploy.local.edge import connect
from deploy.local.layout import Layout
from deploy.local.ports import read_ports
from deploy.local.processes import ProcessSpec, mesh_processes
from deploy.local.readiness import Probe, sync_channel
from deploy.local.supervisor import ProcessState, process_states

CALL_TIMEOUT_SECONDS = 5.0
_PROGRAMS = {"envoy": "envoy", "nats": "nats-server"}  # names in the list of programs


@dataclass(frozen=True, kw_only=True)
class ProcessStatus:
    """One process of a mesh.

    Attributes:
        address: where its callers reach it: `host:port` or `unix:/path`.
        state: the supervisor's word for it, in lower case; `missing` if it does not know it.
        version: of the program; `own` if it is the operator's; `?` if it cannot be found out.
        pid: 0 if it does not run.
        memory_bytes: resident memory of the process and of those it started.
    """

    name: str
    ready: bool
    state: str
    version: str
    address: str
    pid: int
    memory_bytes: int


def process_statuses(layout: Layout) -> list[ProcessStatus]:
    """Returns the state of every process; empty if the mesh does not run."""
    states = process_states(layout)
    if not states:
        return []
    return [
        _process_status(layout, process, states.get(process.name))
        for process in mesh_processes(layout, read_ports(layout))
    ]


def deployment_statuses(layout: Layout) -> list[DeploymentStatus]:
    """Returns the deployments that the registry has.

    Raises:
        CliError: the mesh does not answer.
    """
    with connect(layout, tenant="headrace", user="operator", scopes="read") as edge:
        try:
            return Registry(edge).deployments()
        except CliError as error:
            raise CliError(f"the deployments cannot be listed: {error}") from error


def memory_bytes(pid: int) -> int:
    """Returns the resident memory of a process and its descendants; 0 if it does not exist."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        return sum(member.memory_info().rss for member in family)
    except psutil.NoSuchProcess:
        return 0


def _process_status(
    layout: Layout, process: ProcessSpec, state: ProcessState | None
) -> ProcessStatus:
    pid = state.pid if state else 0
    with Probe(layout, process) as probe:
        ready = bool(pid) and probe.is_ready()
    return ProcessStatus(
        name=process.name,
        ready=ready,
        state=state.state.lower() if state else "missing",
        version=_version(layout, process),
        address=process.address,
        pid=pid,
        memory_bytes=memory_bytes(pid) if pid else 0,
    )


def _version(layout: Layout, process: ProcessSpec) -> str:
    if process.name.startswith("triton-"):
        return _triton_version(layout, process)
    if process.name in _PROGRAMS:
        found = binaries.named(_PROGRAMS[process.name])
        return "own" if found.own_program() else found.version
    try:
        return version("headrace")
    except PackageNotFoundError:
        return "?"


def _triton_version(layout: Layout, process: ProcessSpec) -> str:
    """Asks Triton: the version of its package is not that of the server in it."""
    with sync_channel(layout, process.address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            found = stub.ServerMetadata(
                service_pb2.ServerMetadataRequest(), timeout=CALL_TIMEOUT_SECONDS
            )
        except grpc.RpcError:
            return "?"
        return str(found.version)
