"""`inference.GRPCInferenceService`: translates, nothing else.

Messages that carry tensors come and go as bytes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from importlib import metadata
from typing import Any, TypeAlias

import grpc
from tritonclient.grpc import service_pb2

from libs.clock import Clock
from libs.errors import HeadraceError, NotFound, Unavailable
from libs.rpc.identity import Context, identity_of
from services.inference.api.convert import deadline_seconds
from services.inference.tensors import codec
from services.inference.tensors.calls import SERVICE
from services.inference.tensors.oip import Caller, OpenInference, version_of

# Requests of one stream that run at once; of one that sends more, no more is read.
MAX_REQUESTS_PER_STREAM = 64

GenericHandler: TypeAlias = "grpc.GenericRpcHandler[Any, Any]"

_EXTENSIONS = ("model_configuration", "parameters")


class OpenInferenceServicer:
    """The gRPC side of the Open Inference Protocol, with Triton's streams and configurations."""

    def __init__(self, service: OpenInference, *, clock: Clock) -> None:
        self._service = service
        self._clock = clock

    async def server_live(self, _request: Any, _context: Context) -> Any:
        """Tells that the process answers."""
        return service_pb2.ServerLiveResponse(live=True)

    async def server_ready(self, _request: Any, _context: Context) -> Any:
        """Tells whether routes are known."""
        return service_pb2.ServerReadyResponse(ready=self._service.ready)

    async def server_metadata(self, _request: Any, _context: Context) -> Any:
        """Tells what this is."""
        return service_pb2.ServerMetadataResponse(
            name="headrace", version=metadata.version("headrace"), extensions=_EXTENSIONS
        )

    async def model_ready(self, request: Any, _context: Context) -> Any:
        """Tells whether a backend has the model ready. Of unknown models it says no, as Triton."""
        try:
            self._service.choose(request.name, request.version)
        except (NotFound, Unavailable):
            return service_pb2.ModelReadyResponse(ready=False)
        return service_pb2.ModelReadyResponse(ready=True)

    async def model_metadata(self, request: Any, _context: Context) -> Any:
        """Tells a model's tensors."""
        choice = self._service.choose(request.name, request.version)
        told = await self._service.describe(
            choice,
            "ModelMetadata",
            lambda name: service_pb2.ModelMetadataRequest(name=name),
            service_pb2.ModelMetadataResponse,
        )
        told.name = choice.model
        told.versions[:] = [version_of(choice)]
        return told

    async def model_config(self, request: Any, _context: Context) -> Any:
        """Tells a model's configuration."""
        choice = self._service.choose(request.name, request.version)
        told = await self._service.describe(
            choice,
            "ModelConfig",
            lambda name: service_pb2.ModelConfigRequest(name=name),
            service_pb2.ModelConfigResponse,
        )
        told.config.name = choice.model
        return told

    async def model_infer(self, request: bytes, context: Context) -> bytes:
        """Answers one request."""
        return await self._service.infer(request, self._caller(context))

    async def model_stream_infer(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """Answers many requests at once; whose an answer is tells its id."""
        caller = self._caller(context)
        places = asyncio.Semaphore(MAX_REQUESTS_PER_STREAM)
        writing = asyncio.Lock()

        async def deliver(message: bytes) -> None:
            async with writing:  # gRPC takes one message after the other
                await context.write(message)

        async def answer(request: bytes) -> None:
            try:
                await self._service.stream(request, caller, deliver)
            except HeadraceError as error:
                await deliver(_error_message(error, request))
            finally:
                places.release()

        try:
            async with asyncio.TaskGroup() as group:
                async for request in requests:
                    await places.acquire()
                    group.create_task(answer(request))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # one is enough, and is logged

    def _caller(self, context: Context) -> Caller:
        return Caller(identity_of(context), deadline_seconds(context, self._clock))


def handlers(servicer: OpenInferenceServicer) -> GenericHandler:
    """Returns the handler of the methods that there are; others are unknown to the server."""
    plain = {
        "ServerLive": servicer.server_live,
        "ServerReady": servicer.server_ready,
        "ServerMetadata": servicer.server_metadata,
        "ModelReady": servicer.model_ready,
        "ModelMetadata": servicer.model_metadata,
        "ModelConfig": servicer.model_config,
    }
    methods = {
        name: grpc.unary_unary_rpc_method_handler(
            behavior,
            request_deserializer=getattr(service_pb2, f"{name}Request").FromString,
            response_serializer=getattr(service_pb2, f"{name}Response").SerializeToString,
        )
        for name, behavior in plain.items()
    }
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            **methods,
            "ModelInfer": grpc.unary_unary_rpc_method_handler(servicer.model_infer),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(servicer.model_stream_infer),
        },
    )


def _error_message(error: HeadraceError, request: bytes) -> bytes:
    """Returns a failure as models of the bundled contract tell theirs: the stream goes on."""
    told = {"reason": error.reason, "message": error.message, "metadata": error.metadata}
    try:
        request_id = codec.read_request(request).request_id
    except HeadraceError:
        request_id = ""
    return codec.streamed_error(json.dumps(told), request_id)
