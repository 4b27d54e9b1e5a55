"""The edge with TLS: for gRPC and HTTP, with certificates that are replaced while it runs."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc

from deploy.envoy.tls import Tls
from deploy.local.edge_certificate import install, installed
from tests.support.certificates import Authority
from tests.support.scripted import ScriptedMesh, scripted_mesh

pytestmark = pytest.mark.integration

_PATIENCE_SECONDS = 10.0


class Certificates:
    """Certificates of one authority for the edge of a test."""

    def __init__(self, folder: Path) -> None:
        self._authority = Authority(folder)
        self._files = folder / "given.pem", folder / "given.key"
        self._folder = folder / "tls"
        self.replace()

    @property
    def root(self) -> str:
        return self._authority.pem()

    def settings(self, **more: Any) -> dict[str, Any]:
        """Returns what `scripted_mesh` needs."""
        certificate, key = installed(self._folder)
        tls = Tls(certificate_file=certificate, key_file=key, **more)
        return {"listener_tls": tls, "root": self.root}

    def replace(self) -> str:
        """Installs a new certificate and returns it."""
        certificate, key = self._authority.issue(names=("edge.example",), address="127.0.0.1")
        for file, data in zip(self._files, (certificate, key), strict=True):
            file.write_bytes(data)
        install(*self._files, self._folder)
        return certificate.decode()


@pytest.fixture(name="certificates")
def of_the_edge(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


async def _generate(mesh: ScriptedMesh) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(mesh.channel)
    call = stub.Generate(inference_pb2.GenerateRequest(), metadata=mesh.edge.metadata())
    assert [message async for message in call]


def _seen(mesh: ScriptedMesh) -> str:
    """Returns the certificate that a new caller sees."""
    host, _, port = mesh.edge.address.rpartition(":")
    return ssl.get_server_certificate((host, int(port)), ca_certs=None)


async def test_grpc_and_http_come_over_tls(tmp_path, certificates: Certificates) -> None:
    """Callers who trust the authority get answers, and browsers learn to insist on TLS."""
    async with scripted_mesh(tmp_path / "mesh", **certificates.settings()) as mesh:
        await _generate(mesh)
        headers = mesh.edge.bearer()
        async with mesh.http.post("/v1/chat/completions", json={}, headers=headers) as response:
            assert response.status == 200
            assert response.headers["strict-transport-security"] == "max-age=31536000"
        async with mesh.http.get("/v1/models") as response:  # the edge's own answers too
            assert response.status == 401
            assert "strict-transport-security" in response.headers


async def test_without_tls_nobody_is_answered(tmp_path, certificates: Certificates) -> None:
    """A token that is sent in the clear by mistake gets no answer, and old TLS none either."""
    async with (
        scripted_mesh(tmp_path / "mesh", **certificates.settings(hsts_seconds=0)) as mesh,
        aiohttp.ClientSession() as plain,
    ):
        with pytest.raises(aiohttp.ClientError):
            await plain.get(f"http://{mesh.edge.address}/healthz")
        async with mesh.http.get("/healthz") as response:
            assert "strict-transport-security" not in response.headers
        old = ssl.create_default_context(cadata=certificates.root)
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.deprecated_call():
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(aiohttp.ClientConnectorSSLError):
            await plain.get(f"https://{mesh.edge.address}/healthz", ssl=old)


async def test_a_new_certificate_is_used_without_a_restart(
    tmp_path, certificates: Certificates
) -> None:
    """New connections see it at once, and calls on old ones go on."""
    async with scripted_mesh(tmp_path / "mesh", **certificates.settings()) as mesh:
        await _generate(mesh)
        for _ in range(3):
            expected = certificates.replace()
            async with asyncio.timeout(_PATIENCE_SECONDS):
                while await asyncio.to_thread(_seen, mesh) != expected:
                    await _generate(mesh)
                    await asyncio.sleep(0.02)
            await _generate(mesh)
            async with mesh.edge.channel() as channel:
                await grpc.aio.Channel.channel_ready(channel)


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["::1", "::"])
async def test_the_edge_listens_with_ipv6(tmp_path, host: str) -> None:
    """On the loopback address of IPv6, and on every address, IPv4's included."""
    async with scripted_mesh(tmp_path / "mesh", listen_address=f"[{host}]:0") as mesh:
        port = mesh.edge.address.rpartition(":")[2]
        hosts = ["[::1]", "127.0.0.1"] if host == "::" else ["[::1]"]
        async with aiohttp.ClientSession() as http:
            for each in hosts:
                async with http.get(f"http://{each}:{port}/healthz") as response:
                    assert response.status == 200
