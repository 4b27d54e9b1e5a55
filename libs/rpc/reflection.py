"""Reflection: what a client like grpcurl asks to call the mesh without its protos."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer
from typing_extensions import override

from libs.rpc.public_api import PUBLIC_FILES, public_services, with_dependencies

_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"


def reflect(server: grpc.aio.Server) -> None:
    """Answers reflection, v1 and v1alpha, for every public service of the mesh.

    Each process knows all public protos, so that the edge can ask any of them. Internal protos are
    not in the pool: they are neither listed nor found by name.
    """
    names = [
        *(service.full_name for service in public_services()),
        health.SERVICE_NAME, reflection.SERVICE_NAME, _REFLECTION_V1,
    ]  # fmt: skip
    servicer = _Servicer(names, pool=public_pool())
    for name in (reflection.SERVICE_NAME, _REFLECTION_V1):  # with the same messages
        handler = grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        methods = {"ServerReflectionInfo": handler}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))


def public_pool() -> descriptor_pool.DescriptorPool:
    """Returns the public protos and all that they import."""
    pool = descriptor_pool.DescriptorPool()
    files = (*PUBLIC_FILES, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
    for proto in with_dependencies(files):
        pool.Add(proto)
    return pool


class _Servicer(ReflectionServicer):  # type: ignore[misc]  # grpc_reflection has no types
    """Writes each file once: callers need no token, and writing one takes 0.5 ms."""

    def __init__(self, names: list[str], *, pool: descriptor_pool.DescriptorPool) -> None:
        super().__init__(names, pool=pool)
        self._written: dict[str, list[bytes]] = {}

    @override
    def _file_by_filename(self, request: Any, filename: str) -> Any:
        return self._answer(request, filename, self._pool.FindFileByName)

    @override
    def _file_containing_symbol(self, request: Any, fully_qualified_name: str) -> Any:
        return self._answer(request, fully_qualified_name, self._pool.FindFileContainingSymbol)

    def _answer(self, request: Any, name: str, find: Any) -> Any:
        try:
            file: FileDescriptor = find(name)
        except KeyError:
            error = reflection_pb2.ErrorResponse(
                error_code=grpc.StatusCode.NOT_FOUND.value[0],
                error_message=grpc.StatusCode.NOT_FOUND.value[1],
            )
            return reflection_pb2.ServerReflectionResponse(
                error_response=error, original_request=request
            )
        if file.name not in self._written:
            self._written[file.name] = [
                proto.SerializeToString() for proto in with_dependencies([file])
            ]
        response = reflection_pb2.FileDescriptorResponse(
            file_descriptor_proto=self._written[file.name]
        )
        return reflection_pb2.ServerReflectionResponse(
            file_descriptor_response=response, original_request=request
        )
