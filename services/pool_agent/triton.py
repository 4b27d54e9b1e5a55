"""Controls one Triton server: loads, warms up, probes and unloads models."""

from __future__ import annotations

import json
import struct
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from services.pool_agent.domain import Kind

# Loading may read many gigabytes from the disk.
LOAD_SECONDS = 600.0
UNLOAD_SECONDS = 60.0
WARM_SECONDS = 120.0
ANSWER_SECONDS = 2.0

CONTROL_HEADER = "triton-grpc-protocol-headrace-control-key"
_LENGTH = struct.Struct("<I")
_HELLO = [{"role": "user", "content": "Hello"}]
# In the error of the Python backend when the process of a model has died.
_CRASHED = "is not healthy"


class TritonAway(Exception):  # noqa: N818  # says what happened
    """Triton cannot be reached: it has stopped, or has not started yet."""


class ModelFailed(Exception):  # noqa: N818  # says what happened
    """Triton cannot load or run a model; the message says why."""


class Triton:
    """One Triton server, over one channel that does not retry."""

    def __init__(self, channel: grpc.aio.Channel, *, control_key: str = "") -> None:
        """Makes a client.

        Args:
            channel: to the server.
            control_key: what Triton requires of calls that change or list its models; empty: none.
        """
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        self._control = ((CONTROL_HEADER, control_key),) if control_key else ()

    async def is_ready(self, backend_model: str) -> bool:
        """Returns whether Triton has the model loaded.

        Raises:
            TritonAway: Triton cannot be reached.
            TimeoutError: it is too busy to answer.
        """
        request = service_pb2.ModelReadyRequest(name=backend_model)
        answer = await self._call("ModelReady", request, ANSWER_SECONDS)
        return bool(answer.ready)

    async def loaded(self) -> frozenset[str]:
        """Returns the names of all loaded models.

        Raises:
            TritonAway, TimeoutError: as `is_ready`.
        """
        request = service_pb2.RepositoryIndexRequest(ready=True)
        answer = await self._call("RepositoryIndex", request, ANSWER_SECONDS, self._control)
        return frozenset(model.name for model in answer.models)

    async def load(self, backend_model: str) -> None:
        """Loads a model from its folder.

        Raises:
            ModelFailed: Triton cannot load it.
            TritonAway, TimeoutError: as `is_ready`.
        """
        request = service_pb2.RepositoryModelLoadRequest(model_name=backend_model)
        await self._call("RepositoryModelLoad", request, LOAD_SECONDS, self._control)

    async def unload(self, backend_model: str) -> None:
        """Unloads a model, once the requests that it is answering have ended.

        Raises:
            ModelFailed, TritonAway, TimeoutError: as `load`.
        """
        request = service_pb2.RepositoryModelUnloadRequest(model_name=backend_model)
        await self._call("RepositoryModelUnload", request, UNLOAD_SECONDS, self._control)

    async def warm(self, backend_model: str, kind: Kind) -> None:
        """Runs a model once, so that the first user does not wait for lazy initialization.

        Raises:
            ModelFailed: the model returned an error.
            TritonAway, TimeoutError: as `is_ready`.
        """
        if kind is Kind.CHAT:
            await self._chat(backend_model, {"messages": _HELLO, "max_tokens": 1}, WARM_SECONDS)
        else:
            await self._embed(backend_model, WARM_SECONDS)

    async def probe(self, backend_model: str, kind: Kind) -> None:
        """Sends a small request to a model.

        Raises:
            ModelFailed: its process has died; Triton itself still reports it as ready.
            TritonAway, TimeoutError: as `is_ready`.
        """
        try:
            if kind is Kind.CHAT:
                body = {"operation": "count_tokens", "messages": _HELLO}
                await self._chat(backend_model, body, ANSWER_SECONDS)
            else:
                await self._embed(backend_model, ANSWER_SECONDS)
        except ModelFailed as error:
            if _CRASHED in str(error):
                raise
            # Any other error, such as a full queue, comes from a running process.

    async def _chat(self, backend_model: str, body: dict[str, Any], seconds: float) -> None:
        request = _request(backend_model, "request", json.dumps(body).encode(), [1])
        stream = self._stub.ModelStreamInfer(iter([request]), timeout=seconds)
        try:
            async for message in stream:
                if message.error_message:
                    raise ModelFailed(message.error_message)
        except grpc.aio.AioRpcError as error:
            raise _failure(error) from error

    async def _embed(self, backend_model: str, seconds: float) -> None:
        await self._call("ModelInfer", _request(backend_model, "text", b"Hello", [1, 1]), seconds)

    async def _call(
        self, method: str, request: Any, seconds: float, metadata: tuple[tuple[str, str], ...] = ()
    ) -> Any:
        call = getattr(self._stub, method)
        try:
            return await call(request, timeout=seconds, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise _failure(error) from error


def _failure(error: grpc.aio.AioRpcError) -> Exception:
    details = error.details() or error.code().name
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimeoutError(details)
    # UNAVAILABLE may also be about a model that is not loaded; waiting and loading help there, too.
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return TritonAway(details)
    return ModelFailed(details)


def _request(
    backend_model: str, name: str, value: bytes, shape: list[int]
) -> service_pb2.ModelInferRequest:
    tensor = service_pb2.ModelInferRequest.InferInputTensor(
        name=name, datatype="BYTES", shape=shape
    )
    return service_pb2.ModelInferRequest(
        model_name=backend_model,
        inputs=[tensor],
        raw_input_contents=[_LENGTH.pack(len(value)) + value],
    )
