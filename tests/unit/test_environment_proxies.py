"""A proxy of the environment is for providers: calls inside the mesh never go through it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local import processes
from deploy.local.layout import Layout
from deploy.local.ports import port_names
from services.inference.config import Settings

NOWHERE = "http://127.0.0.1:9"
_NAMES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
EVERYWHERE = dict.fromkeys((*_NAMES, *map(str.lower, _NAMES)), NOWHERE)

CALL = """
import asyncio, grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from libs.clock import SystemClock
from libs.rpc.channel import open_channel
from libs.rpc.server import RpcServer

async def main():
    server = RpcServer("127.0.0.1:0", clock=SystemClock(), reuse_port=False)
    await server.start(ready=True)
    async with open_channel(server.address, traced=False, retries=False) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
    await server.stop(0)

asyncio.run(main())
"""


def in_process(script: str) -> None:
    """Runs a script in the environment of a machine behind a proxy."""
    environment = {**os.environ, **EVERYWHERE}
    for name in ("no_proxy", "NO_PROXY"):
        environment.pop(name, None)
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=60)


def test_calls_between_services_are_direct() -> None:
    """By default gRPC reads `http_proxy`, also for addresses of this machine."""
    in_process(CALL)


@pytest.fixture
def settings_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in EVERYWHERE:
        monkeypatch.delenv(name, raising=False)
    for name in (
        "HOME", "LISTEN_ADDRESS", "METRICS_ADDRESS", "INPUT_HASH_KEY_FILE", "HTTP_LISTEN_ADDRESS",
        "ROUTER_ADDRESS", "COST_ADDRESS", "NATS_URL",
    ):  # fmt: skip
        monkeypatch.setenv(f"HEADRACE_{name}", "x")
    monkeypatch.setenv("HEADRACE_PLAINTEXT", "true")
    return monkeypatch


def test_providers_proxies_come_from_the_usual_variables(settings_environment) -> None:
    """In upper or lower case; the mesh's own settings win."""
    settings_environment.setenv("HTTPS_PROXY", "http://ann:secret@proxy:1")
    settings_environment.setenv("http_proxy", "http://proxy:2")
    settings_environment.setenv("NO_PROXY", "example.com")
    settings_environment.setenv("HEADRACE_PROVIDER_NO_PROXY", "other.example.com")
    settings_environment.setenv("HEADRACE_PROVIDER_CA_FILE", "/etc/ca.pem")
    settings = Settings()
    assert settings.provider_https_proxy == "http://ann:secret@proxy:1"
    assert settings.provider_http_proxy == "http://proxy:2"
    assert settings.provider_no_proxy == "other.example.com"
    assert settings.provider_ca_file == Path("/etc/ca.pem")
    assert "secret" not in repr(settings)


def test_without_a_proxy_providers_are_called_directly(settings_environment) -> None:
    """The default."""
    settings_environment.delenv("NO_PROXY", raising=False)
    settings_environment.delenv("no_proxy", raising=False)
    settings = Settings()
    assert (settings.provider_https_proxy, settings.provider_http_proxy) == ("", "")


def test_only_inference_gets_the_users_proxies(settings_environment, tmp_path: Path) -> None:
    """The other processes of a mesh make no calls to servers outside of it."""
    settings_environment.setenv("https_proxy", NOWHERE)
    layout = Layout(home=tmp_path, edge_port=1)
    ports = dict.fromkeys(port_names(layout), 1)
    found = {
        spec.name: dict(spec.environment)
        for spec in processes.mesh_processes(layout, ports)
        if NOWHERE in spec.environment.values()
    }
    assert list(found) == ["inference"]
    assert found["inference"]["HTTPS_PROXY"] == NOWHERE
    assert "https_proxy" not in found["inference"]
