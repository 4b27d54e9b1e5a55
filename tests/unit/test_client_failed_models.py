"""A model that no backend can load ends the wait for it, over a real channel."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from headrace.registry.v1 import registry_pb2, registry_pb2_grpc
from headrace.router.v1 import router_pb2_grpc

from deploy.client import deployer
from deploy.client.edge import EdgeClient
from deploy.errors import CliError
from deploy.triton.artifact import BundledModel
from tests.support.mesh import SilentProgress

MODEL = BundledModel(model="m", version="1.0.0", kind="chat", artifact=Path("m.tar"), digest="d")


class _Mesh(router_pb2_grpc.RouterServiceServicer, registry_pb2_grpc.RegistryServiceServicer):
    """Has one deployment, which is in the next of `states`, or else in the last."""

    def __init__(self) -> None:
        self.states = [registry_pb2.DEPLOYMENT_STATE_FAILED]

    def Route(self, request, context):
        context.abort(grpc.StatusCode.UNAVAILABLE, "no backend is ready")

    def GetDeployment(self, request, context):
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        deployment = registry_pb2.Deployment(name=request.name)
        deployment.status.state = state
        deployment.status.backends.add(id="triton-0", message="weights are missing")
        return registry_pb2.GetDeploymentResponse(deployment=deployment)


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> _Mesh:
    monkeypatch.setattr(deployer, "FAILED_SECONDS", 0.5)
    monkeypatch.setattr(deployer, "CHECK_PAUSE_SECONDS", 0.05)
    return _Mesh()  # type: ignore[abstract]  # what it does not define answers UNIMPLEMENTED


@pytest.fixture
def waiting(mesh: _Mesh) -> Iterator[deployer.Deployer]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    router_pb2_grpc.add_RouterServiceServicer_to_server(mesh, server)
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(mesh, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with EdgeClient(f"127.0.0.1:{port}", token=str(port)) as edge:
        yield deployer.Deployer(edge, SilentProgress())
    server.stop(None).wait()


def test_a_model_that_no_backend_can_load_is_not_waited_for(waiting: deployer.Deployer):
    """The reason of the backends is the message."""
    started = time.monotonic()

    with pytest.raises(CliError, match=r"m is not ready: triton-0: weights are missing"):
        waiting.wait_until_ready(MODEL)

    assert time.monotonic() - started < 20


def test_a_failure_that_passes_is_waited_for(
    waiting: deployer.Deployer, mesh: _Mesh, monkeypatch: pytest.MonkeyPatch
):
    """An earlier start may have reported it; loading is tried again."""
    monkeypatch.setattr(deployer, "READY_TIMEOUT_SECONDS", 2.0)
    failed, pending = registry_pb2.DEPLOYMENT_STATE_FAILED, registry_pb2.DEPLOYMENT_STATE_PENDING
    mesh.states = [failed, failed, pending]
    started = time.monotonic()

    with pytest.raises(CliError):
        waiting.wait_until_ready(MODEL)

    assert time.monotonic() - started >= 2
