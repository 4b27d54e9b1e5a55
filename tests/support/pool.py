"""Runs a pool of one Triton: registry and pool agent as processes, and models that load fast."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from headrace.common.v1 import backend_pb2, model_pb2
from headrace.registry.v1 import registry_pb2

from deploy.keys import triton_control_key_path
from deploy.triton.artifact import write_artifact
from tests.support.registry import EMBEDDING, RegistryClient
from tests.support.service import RunningService, running_service
from tests.support.triton_server import BACKEND_ID, RunningTriton

WAIT_SECONDS = 30.0

CONFIG = """
backend: "python"
max_batch_size: 8
input [ { name: "text" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "embedding" data_type: TYPE_FP32 dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""
ECHO = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            rows = pb_utils.get_input_tensor_by_name(request, "text").as_numpy().shape[0]
            tensor = pb_utils.Tensor("embedding", np.full((rows, 1), VALUE, np.float32))
            responses.append(pb_utils.InferenceResponse([tensor]))
        return responses
"""


def pack_model(folder: Path, *, code: str = ECHO, value: int = 1, weights: bytes = b"w") -> bytes:
    """Packs a model that answers with `value`, or a model with other code."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "headrace.json": json.dumps(EMBEDDING).encode(),
        "config.pbtxt": CONFIG.encode(),
        "1/model.py": code.replace("VALUE", str(value)).encode(),
        "1/weights": weights,
    }
    paths = {}
    for number, (name, content) in enumerate(files.items()):
        paths[name] = folder / f"{number}"
        paths[name].write_bytes(content)
    write_artifact(paths, folder / "artifact.tar")
    return (folder / "artifact.tar").read_bytes()


@dataclass
class RunningPool:
    """A registry and an agent; the test module runs the Triton."""

    registry: RunningService
    client: RegistryClient
    agent: RunningService
    triton: RunningTriton

    async def deploy(self, model: str, version: str, artifact: bytes) -> str:
        """Registers and deploys a version; returns the name of the deployment."""
        digest = await self.client.upload(artifact)
        existing = await self.client.stub.ListModels(registry_pb2.ListModelsRequest())
        if f"models/{model}" not in [each.name for each in existing.models]:
            await self.client.create_model(model)
        name = f"models/{model}/versions/{version}"
        await self.client.create_version(name, digest)
        deployment = f"deployments/{model}-{version.replace('.', '-')}"
        await self.client.deploy(deployment, name)
        return deployment

    async def backend(
        self, deployment: str, holds: Callable[[backend_pb2.Backend], bool]
    ) -> backend_pb2.Backend:
        """Waits for a report of a deployment that meets a condition."""
        seen = []
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                async for backend in self._backends(deployment):
                    seen.append(backend)
                    if holds(backend):
                        return backend
        except TimeoutError as error:
            raise AssertionError(f"{seen}\n{self.agent.log.read_text()[-3000:]}") from error
        raise AssertionError("the watch ended")

    async def ready(self, deployment: str) -> backend_pb2.Backend:
        return await self.backend(deployment, is_ready)

    async def removed_from_disk(self, backend_model: str) -> None:
        """Waits until the folder of a version is removed."""
        async with asyncio.timeout(WAIT_SECONDS):
            while (self.triton.repository / backend_model).exists():  # noqa: ASYNC110  # a file
                await asyncio.sleep(0.05)

    async def _backends(self, deployment: str) -> AsyncIterator[backend_pb2.Backend]:
        async for snapshot in self.client.watch():
            for each in snapshot.deployments:
                if each.name == deployment:
                    for backend in each.backends:
                        yield backend


def is_ready(backend: backend_pb2.Backend) -> bool:
    return backend.status.state == model_pb2.BACKEND_STATE_READY


def has_failed(backend: backend_pb2.Backend) -> bool:
    return backend.status.state == model_pb2.BACKEND_STATE_FAILED


def is_loading(backend: backend_pb2.Backend) -> bool:
    return backend.status.state == model_pb2.BACKEND_STATE_LOADING


@asynccontextmanager
async def running_pool(home: Path, triton: RunningTriton) -> AsyncIterator[RunningPool]:
    """Runs a registry and the agent of a Triton."""
    async with (
        running_service("registry", home) as registry,
        registry.channel() as channel,
        running_service(
            "pool_agent",
            home,
            HEADRACE_REGISTRY_ADDRESS=registry.address,
            HEADRACE_TRITON_ADDRESS=triton.address,
            HEADRACE_TRITON_CONTROL_KEY_FILE=str(triton_control_key_path(triton.home)),
            HEADRACE_MODEL_REPOSITORY=str(triton.repository),
            HEADRACE_BACKEND_ID=BACKEND_ID,
        ) as agent,
    ):
        yield RunningPool(registry, RegistryClient(channel), agent, triton)
