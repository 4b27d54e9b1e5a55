"""Model control of one Triton, over gRPC."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc
from headrace.common.v1 import model_pb2
from tritonclient.grpc import service_pb2, service_pb2_grpc

from services.pool_agent.domain import Wanted

LOAD_TIMEOUT_SECONDS = 600.0
CALL_TIMEOUT_SECONDS = 5.0
WARM_TIMEOUT_SECONDS = 60.0


class TritonError(Exception):
    """Triton refused, failed, or is not there."""


class TritonControl:
    """Loads, warms, unloads."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

    async def ready_models(self) -> frozenset[str] | None:
        """Returns the models that serve; None while Triton is away."""
        try:
            index = await self._stub.RepositoryIndex(
                service_pb2.RepositoryIndexRequest(ready=True), timeout=CALL_TIMEOUT_SECONDS
            )
        except grpc.aio.AioRpcError:
            return None
        return frozenset(model.name for model in index.models if model.state == "READY")

    async def load(self, name: str) -> None:
        """Loads a model from the repository; returns when it serves.

        Raises:
            TritonError: it cannot be loaded; the message is Triton's.
        """
        try:
            await self._stub.RepositoryModelLoad(
                service_pb2.RepositoryModelLoadRequest(model_name=name),
                timeout=LOAD_TIMEOUT_SECONDS,
            )
        except grpc.aio.AioRpcError as error:
            raise TritonError(f"load: {error.details()}") from error

    async def warm(self, wanted: Wanted) -> None:
        """Runs one small request through a model, so that the first user's is not its first.

        Raises:
            TritonError: the model does not answer.
        """
        request = _warming_request(wanted)
        stream = self._stub.ModelStreamInfer(iter_once(request), timeout=WARM_TIMEOUT_SECONDS)
        try:
            async for response in stream:
                if response.error_message:
                    raise TritonError(f"warm: {response.error_message}")
        except grpc.aio.AioRpcError as error:
            raise TritonError(f"warm: {error.details()}") from error

    async def unload(self, name: str) -> None:
        """Unloads a model; one that is not loaded is fine.

        Raises:
            TritonError: Triton is away.
        """
        try:
            await self._stub.RepositoryModelUnload(
                service_pb2.RepositoryModelUnloadRequest(model_name=name),
                timeout=CALL_TIMEOUT_SECONDS,
            )
        except grpc.aio.AioRpcError as error:
            raise TritonError(f"unload: {error.details()}") from error


async def iter_once(request: Any) -> AsyncIterator[Any]:
    """Yields one request."""
    yield request


def _warming_request(wanted: Wanted) -> Any:
    if wanted.kind == model_pb2.MODEL_KIND_EMBEDDING:
        name, shape, text = "text", [1, 1], "warm"
    else:
        body = {"messages": [{"role": "user", "content": "1"}], "max_tokens": 1, "temperature": 0}
        name, shape, text = "request", [1], json.dumps(body)
    return service_pb2.ModelInferRequest(
        model_name=wanted.backend_model,
        inputs=[
            service_pb2.ModelInferRequest.InferInputTensor(name=name, datatype="BYTES", shape=shape)
        ],
        raw_input_contents=[struct.pack("<I", len(text)) + text.encode()],
    )
