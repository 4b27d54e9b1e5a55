"""A mesh whose processes reach each other over TCP: both sides show certificates of the mesh."""

from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from headrace.registry.v1 import registry_pb2, registry_pb2_grpc

from deploy.certificates import tls_files
from deploy.host import REPOSITORY
from deploy.local.ports import address, read_ports
from libs.chat.wire import text_message
from libs.rpc.channel import open_channel
from libs.tls import MESH_NAME, TlsFiles
from tests.bench.bench_relay import NULL_MODEL
from tests.bench.mesh import deploy
from tests.support.certificates import Authority
from tests.support.mesh import RunningMesh, running_mesh

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

FORGED = (
    ("x-headrace-tenant", "acme"),
    ("x-headrace-user", "ann"),
    ("x-headrace-scopes", "infer read registry internal"),
)
SECONDS = 3.0


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    with running_mesh(tmp_path_factory.mktemp("m"), models=False, transport="tls") as mesh:
        files = {str(path.relative_to(NULL_MODEL)): path for path in NULL_MODEL.rglob("*.*")}
        deploy(mesh, "null", files)
        yield mesh


def inner(mesh: RunningMesh, name: str) -> str:
    return address(read_ports(mesh.layout), name)


async def test_an_answer_streams_through_the_mesh(mesh: RunningMesh):
    """From Triton over `inference` and the edge, with its usage on the bus."""
    assert not [path for path in mesh.layout.sockets.iterdir() if path.name.endswith(".grpc")]
    request = inference_pb2.GenerateRequest(
        model="null", max_tokens=50, messages=[text_message(inference_pb2.ROLE_USER, "5")]
    )
    async with mesh.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(request, metadata=mesh.metadata(scopes="infer"), timeout=60)
        responses = [response async for response in call]
    assert sum(response.delta.token_count for response in responses) == 50
    assert responses[-1].final.usage.completion_tokens == 50
    assert responses[-1].final.cost_nano_usd > 0


async def list_models(mesh: RunningMesh, channel: grpc.aio.Channel) -> int:
    async with channel:
        answer = await registry_pb2_grpc.RegistryServiceStub(channel).ListModels(
            registry_pb2.ListModelsRequest(), metadata=FORGED, timeout=SECONDS
        )
    return len(answer.models)


async def test_a_member_is_believed(mesh: RunningMesh):
    """The control of the next tests."""
    channel = open_channel(inner(mesh, "registry.grpc"), tls=tls_files(mesh.layout.home, "worker"))
    assert await list_models(mesh, channel)


def strangers(mesh: RunningMesh, folder: Path) -> dict[str, TlsFiles | None]:
    """Returns certificates that must not be accepted of a client."""
    home = mesh.layout.home
    other = folder / "other"
    other.mkdir()
    from deploy.certificates import ensure_certificates  # noqa: PLC0415

    ensure_certificates(other)
    worker, ca = tls_files(other, "worker"), tls_files(home, "worker").ca
    return {
        "of another mesh": TlsFiles(ca=ca, certificate=worker.certificate, key=worker.key),
        "of Triton": tls_files(home, "triton"),
        "of NATS": tls_files(home, "nats"),
        "none": None,
    }


@pytest.mark.parametrize("who", ["of another mesh", "of Triton", "of NATS", "none"])
async def test_strangers_are_refused_by_grpc(mesh: RunningMesh, tmp_path: Path, who: str):
    """Also the certificate of Triton, which runs code of others, does not make it a caller."""
    files = strangers(mesh, tmp_path)[who]
    for name in ("registry.grpc", "triton-0.grpc", "inference.grpc"):
        channel = open_channel(inner(mesh, name), tls=files, retries=False)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await list_models(mesh, channel)
        assert refused.value.code() in (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.DEADLINE_EXCEEDED,
        )


@pytest.mark.parametrize("who", ["of another mesh", "of Triton", "none"])
async def test_strangers_are_refused_by_http(mesh: RunningMesh, tmp_path: Path, who: str):
    """The HTTP/1.1 of `inference` answers nobody else."""
    files = strangers(mesh, tmp_path)[who]
    context = files.client_context("http/1.1") if files else None
    request = "GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    request += "".join(f"{key}: {value}\r\n" for key, value in FORGED) + "\r\n"
    host, _, port = inner(mesh, "inference.http").rpartition(":")
    got = b""
    try:
        async with asyncio.timeout(SECONDS):
            reader, writer = await asyncio.open_connection(
                host, int(port), ssl=context, server_hostname=MESH_NAME if context else None
            )
            writer.write(request.encode())
            got = await reader.read(1000)
            writer.close()
    except (OSError, ssl.SSLError, TimeoutError):
        pass
    assert b"200 OK" not in got


async def test_a_server_that_is_not_of_the_mesh_is_told_nothing(tmp_path: Path, mesh: RunningMesh):
    """Whoever takes an address in the mesh gets no request."""
    authority = Authority(tmp_path)
    received = bytearray()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.extend(await reader.read(1000))
        writer.close()

    server = await asyncio.start_server(
        take, "127.0.0.1", 0, ssl=authority.server(address="127.0.0.1")
    )
    port = server.sockets[0].getsockname()[1]
    files = tls_files(mesh.layout.home, "worker")
    with pytest.raises(grpc.aio.AioRpcError):
        await list_models(mesh, open_channel(f"127.0.0.1:{port}", tls=files, retries=False))
    server.close()
    assert not received


def test_a_service_refuses_tcp_without_certificates(tmp_path: Path):
    """Its message says what to do."""
    environment = {
        "PATH": os.environ["PATH"],
        "HEADRACE_HOME": str(tmp_path),
        "HEADRACE_LISTEN_ADDRESS": "127.0.0.1:0",
        "HEADRACE_METRICS_ADDRESS": "127.0.0.1:0",
        "HEADRACE_INPUT_HASH_KEY_FILE": str(tmp_path / "key"),
        "HEADRACE_REGISTRY_ADDRESS": f"unix:{tmp_path}/registry",
    }
    done = subprocess.run(
        [sys.executable, "-m", "services.router"],
        env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "HEADRACE_LISTEN_ADDRESS: without TLS, any program that reaches" in done.stderr
    assert "HEADRACE_TLS_CA_FILE" in done.stderr
    assert "HEADRACE_REGISTRY_ADDRESS" not in done.stderr
