"""The bus with the configuration of a mesh, its clients, and one that tries what is not allowed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client

from deploy import keys
from deploy.certificates import ensure_certificates, tls_files
from deploy.nats.render import Bus, config
from deploy.nats.users import SYSTEM_USER, USERS
from libs.bus.connection import connect
from libs.tls import MESH_NAME
from tests.support.nats import NatsServer, running_nats

# Fixtures for modules that import them.


@pytest.fixture(name="bus")
async def bus_of_a_mesh(tmp_path: Path) -> AsyncIterator[NatsServer]:
    """A server with the configuration of a mesh."""
    ensure_certificates(tmp_path)
    passwords = keys.ensure_nats_credentials(tmp_path, [*USERS, SYSTEM_USER])

    def text(port: int) -> str:
        return config(
            Bus(
                listen_address=f"127.0.0.1:{port}",
                server_name="nats",
                store_dir=tmp_path / "nats",
                passwords=passwords,
                tls=tls_files(tmp_path, "nats"),
            )
        )

    (tmp_path / "nats").mkdir()
    async with running_nats(tmp_path / "nats", text=text) as server:
        yield server


@pytest.fixture(name="home")
def home_of_the_bus(tmp_path: Path) -> Path:
    return tmp_path


@asynccontextmanager
async def client_of(bus: NatsServer, home: Path, user: str) -> AsyncIterator[Client]:
    """Connects like the service."""
    client = await connect(
        bus.url,
        name=user,
        credentials_file=keys.nats_credentials_path(home, user),
        tls=tls_files(home, "worker"),
    )
    try:
        yield client
    finally:
        await client.close()


def tls_of(home: Path) -> dict[str, Any]:
    """Returns the options of a client with a certificate of the mesh."""
    return {
        "tls": tls_files(home, "worker").client_context(),
        "tls_hostname": MESH_NAME,
        "tls_handshake_first": True,
    }


class Recorder:
    """A raw client that can send any command; records what the server refused."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.received: list[str] = []
        self.client = Client()

    async def open(self, bus: NatsServer, home: Path, user: str) -> None:
        name, _, password = keys.nats_credentials_path(home, user).read_text().partition(":")
        await self.client.connect(
            bus.url,
            user=name,
            password=password,
            error_cb=self._on_error,
            inbox_prefix=user,
            **tls_of(home),
        )

    async def _on_error(self, error: Exception) -> None:
        self.errors.append(str(error).lower())

    async def _on_message(self, message: object) -> None:
        self.received.append(str(message))

    async def may_publish(self, subject: str) -> bool:
        self.errors.clear()
        await self.client.publish(subject, b"x")
        await self.client.flush()
        await asyncio.sleep(0.02)
        return not any("publish" in error for error in self.errors)

    async def may_subscribe(self, subject: str) -> bool:
        self.errors.clear()
        await self.client.subscribe(subject, cb=self._on_message)
        await self.client.flush()
        await asyncio.sleep(0.05)
        return not any("subscription" in error for error in self.errors)


@asynccontextmanager
async def intruder(bus: NatsServer, home: Path, user: str) -> AsyncIterator[Recorder]:
    recorder = Recorder()
    await recorder.open(bus, home, user)
    try:
        yield recorder
    finally:
        await recorder.client.close()
