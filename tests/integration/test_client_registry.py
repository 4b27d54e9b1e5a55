"""Operators' calls of a registry, and the commands that make them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

import grpc
import pytest
import structlog
from headrace.registry.v1 import registry_pb2 as pb
from typer.testing import CliRunner, Result

from cli import registry as commands
from cli.__main__ import app
from deploy.client import registry as client_module
from deploy.client.deployer import Deployer
from deploy.client.edge import EdgeClient
from deploy.client.registry import Registry
from deploy.errors import CliError
from deploy.triton.artifact import BundledModel
from tests.support.mesh import SilentProgress
from tests.support.registry import OPERATOR, RegistryClient, backend, serving_registry

pytestmark = pytest.mark.integration

T = TypeVar("T")


class DirectClient:
    """Stands for the edge: calls with the metadata that it would add."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address)
        self.metadata = OPERATOR


class Notes(SilentProgress):
    """Keeps what the user should know."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[RegistryClient]:
    url = f"sqlite+aiosqlite:///{tmp_path}/registry.db"
    # Its log must not get into the output of the commands, which run in the same process.
    with structlog.testing.capture_logs():
        async with serving_registry(url, tmp_path) as client:
            await client.register("smollm2", "1.0.0", "1.10.0", "1.9.0")
            await client.deploy("deployments/chat", "models/smollm2/versions/1.0.0")
            yield client


@pytest.fixture
def edge(served: RegistryClient) -> Iterator[EdgeClient]:
    direct = DirectClient(served.address)
    yield cast(EdgeClient, direct)
    direct.channel.close()


@pytest.fixture
def command(edge: EdgeClient, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command beside the registry; returns its exit status and output."""

    @contextmanager
    def connect(_scopes: str) -> Iterator[EdgeClient]:
        yield edge

    monkeypatch.setattr(commands, "_connect", connect)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})

    return run


async def in_thread(work: Callable[[], T]) -> T:
    """Runs what blocks, while the registry answers in this thread."""
    return await asyncio.to_thread(work)


async def test_deployments_and_models_are_listed_over_all_pages(served, edge, monkeypatch):
    """Versions come the highest first."""
    monkeypatch.setattr(client_module, "PAGE_SIZE", 1)
    await served.create_model("minilm", "embeddings")
    await served.deploy("deployments/gpu", "models/smollm2/versions/1.9.0", pool="gpu")
    await served.report("deployments/gpu", backend(message="no memory"))
    chat, gpu = await in_thread(Registry(edge).deployments)
    assert (chat.name, chat.state, chat.model_version) == ("chat", "pending", "smollm2@1.0.0")
    assert (gpu.name, gpu.state, gpu.pool) == ("gpu", "failed", "gpu")
    assert [(one.id, one.state, one.message) for one in gpu.backends] == [
        ("triton-0", "failed", "no memory")
    ]
    (only,) = await in_thread(lambda: Registry(edge).deployments('spec.pool = "gpu"'))
    assert only == gpu
    minilm, smollm2 = await in_thread(Registry(edge).models)
    assert (minilm.name, minilm.description, minilm.versions) == ("minilm", "embeddings", [])
    assert smollm2.versions == ["1.10.0", "1.9.0", "1.0.0"]


async def test_a_deployment_is_updated_if_it_has_not_changed_since(served, edge):
    """The etag that was read protects against a change in between, a given one against older."""
    (before,) = await in_thread(Registry(edge).deployments)
    after = await in_thread(
        lambda: Registry(edge).update_deployment("chat", version="1.9.0", pool=None)
    )
    assert (after.model_version, after.pool) == ("smollm2@1.9.0", "default")
    for change in (
        lambda: Registry(edge).update_deployment("chat", version=None, pool="x", etag=before.etag),
        lambda: Registry(edge).delete_deployment("chat", etag=before.etag),
    ):
        with pytest.raises(CliError, match="ETAG_MISMATCH"):
            await in_thread(change)
    await in_thread(lambda: Registry(edge).delete_deployment("chat", etag=after.etag))
    assert await in_thread(Registry(edge).deployments) == []


async def test_a_deployment_of_an_earlier_bundled_version_is_updated(served, edge):
    """One that serves a version of the user's own is left alone, and that is said."""
    progress = Notes()

    def upgrade(version: str, *replaces: str) -> None:
        bundled = BundledModel(
            model="smollm2",
            version=version,
            kind="chat",
            artifact=Path(),
            digest="",
            replaces=replaces,
        )
        new = pb.Deployment(
            name="deployments/chat",
            spec=pb.DeploymentSpec(model_version=f"models/smollm2/versions/{version}"),
        )
        Deployer(edge, progress)._upgrade(new, bundled)

    async def served_version() -> str:
        (chat,) = await in_thread(Registry(edge).deployments)
        return chat.model_version

    await in_thread(lambda: upgrade("1.9.0", "1.0.0"))
    assert await served_version() == "smollm2@1.9.0"
    await in_thread(lambda: upgrade("1.9.0", "1.0.0"))
    assert progress.notes == ["deployments/chat: 1.0.0 is replaced by 1.9.0"]
    await in_thread(lambda: upgrade("1.10.0", "1.0.0"))
    assert await served_version() == "smollm2@1.9.0"
    assert "left unchanged" in progress.notes[-1]


async def test_the_commands_print_tables_and_json(served, command):
    """Tables for people, JSON with all fields for scripts."""
    listed = await in_thread(lambda: command("deployment", "ls"))
    assert listed.exit_code == 0
    assert "smollm2@1.0.0" in listed.stdout
    answer = await in_thread(
        lambda: command("deployment", "update", "chat", "--version", "1.10.0", "--json")
    )
    (updated,) = json.loads(answer.stdout)
    assert updated["model_version"] == "smollm2@1.10.0"
    filtered = await in_thread(
        lambda: command("deployment", "ls", "--filter", 'spec.pool = "gpu"', "--json")
    )
    assert json.loads(filtered.stdout) == []
    models = await in_thread(lambda: command("model", "ls"))
    assert "1.10.0, 1.9.0, 1.0.0" in models.stdout
    as_json = await in_thread(lambda: command("model", "ls", "--json"))
    assert json.loads(as_json.stdout)[0]["versions"] == ["1.10.0", "1.9.0", "1.0.0"]
    deleted = await in_thread(lambda: command("deployment", "delete", "chat"))
    assert deleted.stdout == "deleted chat\n"
    missing = await in_thread(lambda: command("deployment", "delete", "chat"))
    assert isinstance(missing.exception, CliError)
    assert "RESOURCE_NOT_FOUND" in str(missing.exception)
