"""Another account of the machine, with every port, socket and file of a mesh at hand, gets nothing.

The mesh's folder is readable for it, as that of a checkout may be, and it has seen the arguments of
all processes. The same attempts as root show that they would succeed without the locks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc

from deploy.host import REPOSITORY
from deploy.keys import keys_dir, triton_control_key_path
from deploy.local.ports import EDGE, read_ports, triton_address
from deploy.local.session import mesh_members
from deploy.triton.command import CONTROL_HEADER, SHARED_MEMORY, region_prefix
from libs.chat.wire import text_message
from tests.support.mesh import RunningMesh, running_mesh

STRANGER = 65533
CANARY = "canary-of-the-prompt"

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as another account"),
]


@pytest.fixture(scope="module")
def mesh() -> Iterator[RunningMesh]:
    """A mesh with the bundled models in a folder that others can enter."""
    with tempfile.TemporaryDirectory(prefix="hri") as folder:
        home = Path(folder) / "mesh"
        home.mkdir()
        for path in (Path(folder), home):
            path.chmod(0o755)
        with running_mesh(home, models=True) as mesh:
            yield mesh


async def ask(mesh: RunningMesh) -> str:
    """Asks the model, with the canary in the prompt."""
    request = inference_pb2.GenerateRequest(
        model="smollm2",
        max_tokens=4,
        messages=[text_message(inference_pb2.ROLE_USER, CANARY)],
    )
    async with mesh.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(request, metadata=mesh.metadata(scopes="infer"), timeout=30)
        return "".join([response.delta.text async for response in call])


def loopback_ports(mesh: RunningMesh) -> dict[int, str]:
    """Returns the TCP ports of the mesh's processes, with the name of the process.

    All must be of the loopback interface.
    """
    found = {}
    for process in mesh_members(mesh.layout):
        for connection in process.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip == "127.0.0.1", process.cmdline()
                found[connection.laddr.port] = process.name()
    return found


def engine_ports(mesh: RunningMesh) -> set[int]:
    """Returns the ports of the engines of chat models, which ask for a key."""
    return {
        port for port, name in loopback_ports(mesh).items() if name.startswith("triton_python_b")
    }


def everything(mesh: RunningMesh) -> dict[str, Any]:
    """Returns what there is to attack."""
    home = mesh.layout.home
    paths = [home, *home.rglob("*")]
    prefix = region_prefix(home / "triton" / "triton-0")
    key = triton_control_key_path(home).read_text()
    credentials = [path.read_text() for path in keys_dir(home).glob("nats-*.credentials")]
    return {
        "files": [str(path) for path in paths if path.is_file()],
        "folders": [str(path) for path in paths if path.is_dir() and path != home],
        "sockets": [str(path) for path in paths if path.is_socket()],
        "memory": [str(path) for path in SHARED_MEMORY.glob(f"{prefix}*")],
        "pids": [process.pid for process in mesh_members(mesh.layout)],
        "ports": list(loopback_ports(mesh)),
        "bus": read_ports(mesh.layout)["nats.client"],
        "control_header": [CONTROL_HEADER, key],
        "passwords": credentials,
        "secrets": [text.partition(":")[2] for text in credentials],
    }


def intrude(mesh: RunningMesh, account: int) -> dict[str, list[str]]:
    """Runs the intruder as an account; returns what worked."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.intruder", str(account)],
        input=json.dumps(everything(mesh)),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def test_only_the_edge_the_bus_and_metrics_listen_at_ports(mesh: RunningMesh):
    """Everything else is a socket in the mesh's folder."""
    expected = {
        port
        for name, port in read_ports(mesh.layout).items()
        if name in (EDGE, "nats.client") or name.endswith(".metrics")
    }
    assert set(loopback_ports(mesh)) == expected | engine_ports(mesh)
    assert len(engine_ports(mesh)) <= 1
    folder = mesh.layout.sockets
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_socket()}
    assert {"registry.grpc", "inference.http", "triton-0/grpc:1", "envoy.admin"} <= names


async def test_another_account_gets_nothing(mesh: RunningMesh):
    """No message read, none forged, no identity believed, no model loaded, no file opened."""
    assert await ask(mesh)
    ports = read_ports(mesh.layout)
    worked = intrude(mesh, STRANGER)

    assert worked["files"] == []
    assert worked["folders"] == []
    assert worked["writes"] == []
    assert worked["sockets"] == []
    assert worked["memory"] == []
    assert worked["environments"] == []
    assert worked["arguments"] == []
    assert worked["greetings"] == []
    assert worked["bus"] == []
    metrics = {f"{port} metrics" for name, port in ports.items() if name.endswith(".metrics")}
    # An engine says to everybody that it lives, and which model it has.
    open_paths = {
        f"{port} GET {path}" for port in engine_ports(mesh) for path in ("/health", "/v1/models")
    }
    assert set(worked["http"]) <= metrics | open_paths
    assert worked["grpc"] == []
    assert await ask(mesh)  # and it still works


async def test_the_same_attempts_succeed_without_the_locks(mesh: RunningMesh):
    """As root, which no lock keeps out: so they would have succeeded."""
    await ask(mesh)
    given = everything(mesh)
    worked = intrude(mesh, 0)

    assert set(worked["sockets"]) == set(given["sockets"])
    assert worked["memory"]
    assert len(worked["files"]) > 20
    assert worked["environments"]
    grpc_calls = {text.split(" ", 1)[1] for text in worked["grpc"]}
    assert {"ListModels OK", "WatchDeployments OK", "QueryUsage OK", "RepositoryIndex OK"} <= (
        grpc_calls
    )


def test_metrics_name_no_prompts(mesh: RunningMesh):
    """Any account can read them."""
    import urllib.request  # noqa: PLC0415

    for name, port in read_ports(mesh.layout).items():
        if name.endswith(".metrics"):
            path = "/stats/prometheus" if name.startswith("envoy") else "/metrics"
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                assert CANARY.encode() not in answer.read()


def test_triton_loads_nothing_without_its_key(mesh: RunningMesh):
    """Also for a process that reaches its socket, such as `inference`."""
    import grpc  # noqa: PLC0415
    from tritonclient.grpc import service_pb2, service_pb2_grpc  # noqa: PLC0415

    address = triton_address(mesh.layout, read_ports(mesh.layout), "triton-0")
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=5).ready
        for method, request in (
            ("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name="x")),
            ("RepositoryIndex", service_pb2.RepositoryIndexRequest()),
            ("SystemSharedMemoryStatus", service_pb2.SystemSharedMemoryStatusRequest()),
            ("ModelStatistics", service_pb2.ModelStatisticsRequest()),
            ("TraceSetting", service_pb2.TraceSettingRequest()),
            ("LogSettings", service_pb2.LogSettingsRequest()),
        ):
            for metadata in ((), ((CONTROL_HEADER, "guess"),)):
                with pytest.raises(grpc.RpcError, match="restricted"):
                    getattr(stub, method)(request, timeout=5, metadata=metadata)
