"""Each RPC reaches its service, and an internal one reaches none."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import descriptor_pb2, empty_pb2
from grpc_health.v1 import health_pb2
from typing_extensions import override

from deploy.envoy.render import CLUSTERS
from deploy.envoy.routes import HTTP_CLUSTERS, descriptors
from libs.clock import SystemClock
from libs.rpc.grpc_http1 import GrpcCall, GrpcHttp1Handler
from libs.rpc.reflection import reflect
from tests.support.edge import NOWHERE, RunningEdge, running_edge, serving_http
from tests.support.scripted import GENERATE_PATH

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

_GRPCURL = str(Path(sys.executable).with_name("grpcurl"))
_SERVING = health_pb2.HealthCheckResponse(
    status=health_pb2.HealthCheckResponse.SERVING
).SerializeToString()
_CLUSTER_OF_PACKAGE = {"embedding": "embedding_cache"}

Seen = list[tuple[str, str, dict[str, Any]]]


class Recorder(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in stubs only
    """Answers any method with one empty message and records the cluster and the method."""

    def __init__(self, cluster: str, seen: Seen) -> None:
        self._cluster = cluster
        self._seen = seen

    @override
    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        method = str(handler_call_details.method)
        if method.startswith("/grpc.reflection."):
            return None  # answered by the mesh's own reflection

        async def answer(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            metadata = dict(context.invocation_metadata())
            async for _ in requests:
                pass
            if metadata.get("user-agent") != "Envoy/HC":
                self._seen.append((self._cluster, method, metadata))
            yield _SERVING if method.startswith("/grpc.health.") else b""

        return grpc.stream_stream_rpc_method_handler(answer)


@asynccontextmanager
async def _recording(recorder: Recorder) -> AsyncIterator[str]:
    server = grpc.aio.server()
    reflect(server)
    server.add_generic_rpc_handlers((recorder,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=None)


def _recording_http(cluster: str, seen: Seen) -> AbstractAsyncContextManager[str]:
    """Serves what goes on in HTTP/1.1, and notes it likewise."""

    async def answer(_request: Any, context: GrpcCall) -> None:
        seen.append((cluster, GENERATE_PATH, dict(context.invocation_metadata())))
        await context.write(empty_pb2.Empty())

    method = GrpcHttp1Handler(
        GENERATE_PATH, answer, request_type=empty_pb2.Empty, clock=SystemClock()
    )
    return serving_http(grpc_methods=[method])


@dataclass
class RecordedMesh:
    edge: RunningEdge
    channel: grpc.aio.Channel
    seen: Seen

    async def call(self, path: str) -> None:
        """Sends one empty message, which is valid for methods of all four kinds."""
        call = self.channel.unary_stream(path, bytes, bytes)(b"", metadata=self.edge.metadata())
        _ = [message async for message in call]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory) -> AsyncIterator[RecordedMesh]:
    async with AsyncExitStack() as stack:
        seen: Seen = []
        addresses = {}
        for name in CLUSTERS:
            grpc_or_http = (
                _recording_http(name, seen)
                if name in HTTP_CLUSTERS
                else _recording(Recorder(name, seen))
            )
            address = await stack.enter_async_context(grpc_or_http)
            # Besides the one that answers, each cluster has a replica that does not.
            addresses[name] = [NOWHERE, address]
        home = tmp_path_factory.mktemp("edge")
        edge = await stack.enter_async_context(running_edge(home, addresses))
        channel = await stack.enter_async_context(edge.channel())
        yield RecordedMesh(edge, channel, seen)


def _methods() -> list[str]:
    files = descriptor_pb2.FileDescriptorSet.FromString(descriptors()).file
    return [
        f"/{file.package}.{service.name}/{method.name}"
        for file in files
        for service in file.service
        for method in service.method
    ]


def _cluster_of(path: str) -> str:
    if path == GENERATE_PATH:
        return "inference_http"
    package = path.split(".")[1]
    return _CLUSTER_OF_PACKAGE.get(package, package)


@pytest.mark.parametrize("path", _methods())
async def test_a_public_method_reaches_its_service(mesh: RecordedMesh, path: str) -> None:
    """Each method of the protos, also while one replica of its service is dead."""
    mesh.seen.clear()
    await mesh.call(path)
    assert [(cluster, method) for cluster, method, _ in mesh.seen] == [(_cluster_of(path), path)]


@pytest.mark.parametrize(
    "path",
    [
        "/headrace.cost.v1.CostService/NoSuchMethod",
        "/headrace.cost.v1.CostService/ListPrices/",
        "/headrace.none.v1.NoService/Method",
        "/grpc.channelz.v1.Channelz/GetServers",
    ],
)
async def test_unknown_methods_reach_no_service(mesh: RecordedMesh, path: str) -> None:
    """The edge answers them."""
    mesh.seen.clear()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.call(path)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert mesh.seen == []


async def test_open_calls_carry_no_identity(mesh: RecordedMesh) -> None:
    """Calls without a token have no identity headers."""
    mesh.seen.clear()
    check = mesh.channel.unary_unary("/grpc.health.v1.Health/Check", bytes, bytes)
    spoofed = (
        ("x-headrace-tenant", "victim"),
        ("x-headrace-scopes", "registry"),
        ("x-other", "kept"),
    )
    assert await check(b"", metadata=spoofed) == _SERVING
    ((_, _, metadata),) = mesh.seen
    assert metadata["x-other"] == "kept"
    assert not [key for key in metadata if key.startswith("x-headrace-")]


async def _grpcurl(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        _GRPCURL, "-plaintext", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


async def test_grpcurl_lists_all_services_without_protos_and_token(mesh: RecordedMesh) -> None:
    """`grpcurl -plaintext … list` shows all services of the mesh through one port."""
    status, output = await _grpcurl(mesh.edge.address, "list")
    assert status == 0, output
    expected = {method[1:].partition("/")[0] for method in _methods()}
    assert expected <= set(output.split())
    assert "InferenceInternalService" not in output


async def test_grpcurl_describes_and_calls_without_protos(mesh: RecordedMesh) -> None:
    """Reflection has the messages too, so a caller needs only a token."""
    status, output = await _grpcurl(
        "-H", f"authorization: Bearer {mesh.edge.token()}", "-d", '{"name":"jobs/1"}',
        mesh.edge.address, "headrace.jobs.v1.JobService/GetJob",
    )  # fmt: skip
    assert status == 0, output
    assert json.loads(output) == {}
    assert mesh.seen[-1][:2] == ("jobs", "/headrace.jobs.v1.JobService/GetJob")
