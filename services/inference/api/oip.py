"""`inference.GRPCInferenceService`, the Open Inference Protocol v2: translation only.

Messages that carry tensors stay bytes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from importlib.metadata import version as version_of_package
from typing import Any, TypeAlias

import grpc
from tritonclient.grpc import service_pb2

from libs.clock import Clock
from libs.errors import HeadraceError, InvalidArgument, NotFound, Unavailable, forget_frames
from libs.rpc.identity import Context, identity_of
from services.inference.api.arrivals import Arrivals
from services.inference.api.convert import deadline_seconds
from services.inference.backends.triton.client import SERVICE
from services.inference.tensors import codec
from services.inference.tensors.oip import Caller, OpenInference, version_of

# Requests of one stream that run concurrently; further ones are read when one of them ends.
MAX_REQUESTS_PER_STREAM = 64

GenericHandler: TypeAlias = "grpc.GenericRpcHandler[Any, Any]"

_EXTENSIONS = ("model_configuration", "parameters")


class OpenInferenceServicer:
    """The gRPC side of the Open Inference Protocol, with Triton's streams and configurations."""

    def __init__(self, service: OpenInference, arrivals: Arrivals, *, clock: Clock) -> None:
        self._service = service
        self._arrivals = arrivals
        self._clock = clock

    async def server_live(self, _request: Any, _context: Context) -> Any:
        """Answers: the process runs."""
        return service_pb2.ServerLiveResponse(live=True)

    async def server_ready(self, _request: Any, _context: Context) -> Any:
        """Returns whether routes are known."""
        return service_pb2.ServerReadyResponse(ready=self._service.ready)

    async def server_metadata(self, _request: Any, _context: Context) -> Any:
        """Returns the server's name, version and extensions."""
        return service_pb2.ServerMetadataResponse(
            name="headrace", version=version_of_package("headrace"), extensions=_EXTENSIONS
        )

    async def model_ready(self, request: Any, _context: Context) -> Any:
        """Returns whether a backend has the model ready; False for unknown models, as in Triton."""
        try:
            self._service.choose(request.name, request.version)
        except (NotFound, Unavailable):
            return service_pb2.ModelReadyResponse(ready=False)
        return service_pb2.ModelReadyResponse(ready=True)

    async def model_metadata(self, request: Any, context: Context) -> Any:
        """Returns a model's tensors."""
        choice = self._service.choose(request.name, request.version)
        metadata = await self._service.describe(
            choice,
            "ModelMetadata",
            lambda name: service_pb2.ModelMetadataRequest(name=name),
            service_pb2.ModelMetadataResponse,
            deadline_seconds=deadline_seconds(context, self._clock),
        )
        metadata.name = choice.model
        metadata.versions[:] = [version_of(choice)]
        return metadata

    async def model_config(self, request: Any, context: Context) -> Any:
        """Returns a model's configuration."""
        choice = self._service.choose(request.name, request.version)
        response = await self._service.describe(
            choice,
            "ModelConfig",
            lambda name: service_pb2.ModelConfigRequest(name=name),
            service_pb2.ModelConfigResponse,
            deadline_seconds=deadline_seconds(context, self._clock),
        )
        response.config.name = choice.model
        return response

    async def model_infer(self, _requests: AsyncIterator[bytes], context: Context) -> bytes:
        """Answers one request; it is read here, so that reading it can wait."""
        caller = self._caller(context)
        tenant = caller.identity.tenant
        request = await self._arrivals.only(tenant, lambda: _read(context))
        if request is None:
            raise InvalidArgument("the call has no message", reason="INVALID_FIELD")
        try:
            return await self._service.infer(request, caller)
        finally:
            self._arrivals.release(tenant, request)

    async def model_stream_infer(self, _requests: AsyncIterator[bytes], context: Context) -> None:
        """Answers many requests concurrently; each answer has the id of its request."""
        caller = self._caller(context)
        with self._arrivals.stream(caller.identity.tenant):
            await self._answer_stream(caller, context)

    async def _answer_stream(self, caller: Caller, context: Context) -> None:
        tenant = caller.identity.tenant
        slots = asyncio.Semaphore(MAX_REQUESTS_PER_STREAM)
        writing = asyncio.Lock()

        async def deliver(message: bytes) -> None:
            async with writing:  # gRPC accepts one message at a time
                await context.write(message)

        async def answer(request: bytes) -> None:
            try:
                await self._service.stream(request, caller, deliver)
            except HeadraceError as error:
                forget_frames(error)
                await deliver(_error_message(error, request))
            finally:
                self._arrivals.release(tenant, request)
                slots.release()

        try:
            async with asyncio.TaskGroup() as group:
                while (
                    request := await self._arrivals.next(tenant, lambda: _read(context))
                ) is not None:
                    await slots.acquire()
                    group.create_task(answer(request))
                    del request  # it may be large, and the next one may come much later
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # one error is enough for the caller

    def _caller(self, context: Context) -> Caller:
        return Caller(identity_of(context), deadline_seconds(context, self._clock))


def handlers(servicer: OpenInferenceServicer) -> GenericHandler:
    """Returns the handler of the methods that are offered, except the one that streams."""
    unary = {
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
        for name, behavior in unary.items()
    }
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            **methods,
            # The same on the wire as a unary method, but the message is read by the handler.
            "ModelInfer": grpc.stream_unary_rpc_method_handler(servicer.model_infer),
        },
    )


def stream_handlers(servicer: OpenInferenceServicer) -> GenericHandler:
    """Returns the handler of `ModelStreamInfer`, which may have a server of its own."""
    handler = grpc.stream_stream_rpc_method_handler(servicer.model_stream_infer)
    return grpc.method_handlers_generic_handler(SERVICE, {"ModelStreamInfer": handler})


async def _read(context: Context) -> bytes | None:
    """Returns the next message of a call; None: there are no more.

    The iterator of gRPC would keep each message until the next one has arrived.
    """
    message: Any = await context.read()
    return None if message is grpc.aio.EOF else message  # type: ignore[attr-defined]  # not in the stubs


def _error_message(error: HeadraceError, request: bytes) -> bytes:
    """Returns an error as Headrace's models report theirs: the stream continues."""
    fields = {"reason": error.reason, "message": error.message, "metadata": error.metadata}
    try:
        request_id = codec.read_request(request).request_id
    except HeadraceError:
        request_id = ""
    return codec.streamed_error(json.dumps(fields), request_id)
