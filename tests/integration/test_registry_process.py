"""The registry as a process that may be killed at any time."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from headrace.registry.v1 import registry_internal_pb2 as internal_pb
from headrace.registry.v1 import registry_pb2 as pb

from libs.clock import SystemClock
from libs.errors import Unavailable
from libs.rpc.status import headrace_errors
from libs.rpc.watch import SnapshotWatch
from tests.support.registry import (
    REGISTRAR,
    RegistryClient,
    artifact,
    backend,
    digest_of,
    parts,
    serving_registry,
)
from tests.support.service import running_service

pytestmark = pytest.mark.integration

MIB = 1024 * 1024
VERSION = "models/smollm2/versions/1.0.0"


def files(home: Path) -> list[Path]:
    found = (home / "artifacts").rglob("*")
    return [path for path in found if path.is_file()]


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(15):
        while not holds():  # noqa: ASYNC110  # files and snapshots have no event to wait for
            await asyncio.sleep(0.01)


async def half_of(content: bytes) -> AsyncIterator[pb.UploadArtifactRequest]:
    requests = parts(content)
    for _ in range(3):
        yield await anext(requests)
    await asyncio.Event().wait()


async def test_nothing_is_left_of_an_upload_that_a_kill_cut_off(tmp_path):
    """The next start removes it; the same upload then succeeds."""
    content = artifact(payload=b"w" * 4 * MIB)
    async with running_service("registry", tmp_path) as service:
        async with service.channel() as channel:
            call = RegistryClient(channel).stub.UploadArtifact(half_of(content), metadata=REGISTRAR)
            await until(lambda: sum(path.stat().st_size for path in files(tmp_path)) >= 2 * MIB)
            await service.kill()
            assert await call.code() == grpc.StatusCode.UNAVAILABLE
        assert len(files(tmp_path)) == 1
        await service.start()
        assert files(tmp_path) == []
        async with service.channel() as channel:
            registry = RegistryClient(channel)
            digest = await registry.upload(content)
            assert await registry.download(digest) == content


async def test_an_upload_that_runs_survives_the_start_of_another_replica(tmp_path):
    """Only the files of ended uploads are removed."""
    content = artifact(payload=b"w" * 4 * MIB)
    resume = asyncio.Event()

    async def requests() -> AsyncIterator[pb.UploadArtifactRequest]:
        async for part in parts(content):
            yield part
            if part.WhichOneof("part") == "chunk":
                await resume.wait()

    async with running_service("registry", tmp_path) as service, service.channel() as channel:
        registry = RegistryClient(channel)
        uploading = registry.stub.UploadArtifact(requests(), metadata=REGISTRAR)
        await until(lambda: files(tmp_path))
        async with serving_registry(f"sqlite+aiosqlite:///{tmp_path}/other.db", tmp_path):
            resume.set()
            await uploading
        assert await registry.download(digest_of(content)) == content


async def test_what_was_acknowledged_survives_a_kill(tmp_path):
    """Killed while it writes as fast as it can: all that was acknowledged is still there."""
    async with running_service("registry", tmp_path) as service:
        async with service.channel() as channel:
            registry = RegistryClient(channel)
            digest = await registry.register("smollm2", "1.0.0")
            acknowledged: list[str] = []

            async def write() -> None:
                for number in range(100_000):
                    name = f"deployments/d{number}"
                    await registry.deploy(name, VERSION)
                    await registry.report(name, backend())
                    acknowledged.append(name)

            writing = asyncio.ensure_future(write())
            await until(lambda: len(acknowledged) >= 20)
            await service.kill()
            with pytest.raises(grpc.aio.AioRpcError):
                await writing
        await service.start()
        async with service.channel() as channel:
            registry = RegistryClient(channel)
            listed = await registry.stub.ListDeployments(pb.ListDeploymentsRequest(page_size=1000))
            found = {one.name: one.status.backends for one in listed.deployments}
            assert all(len(found[name]) == 1 for name in acknowledged)
            assert await registry.download(digest) == artifact()


async def test_a_watch_continues_over_restarts_with_growing_revisions(tmp_path):
    """A watch ends up with the newest state, whether the registry was killed or stopped."""
    sent: list[internal_pb.WatchDeploymentsResponse] = []
    async with running_service("registry", tmp_path) as service, service.channel() as channel:
        registry = RegistryClient(channel)
        watch = SnapshotWatch(
            "registry",
            open_stream=registry.watch,
            on_snapshot=sent.append,
            clock=SystemClock(),
        )
        watching = asyncio.create_task(watch.run())
        await registry.register("smollm2", "1.0.0")
        await registry.deploy("deployments/a", VERSION)
        await until(lambda: sent and len(sent[-1].deployments) == 1)
        await service.kill()
        await service.start()
        await channel.channel_ready()
        await registry.deploy("deployments/b", VERSION)
        await until(lambda: len(sent[-1].deployments) == 2)
        assert await service.terminate() == 0
        await service.start()
        await channel.channel_ready()
        await registry.undeploy("deployments/a")
        await until(lambda: [one.name for one in sent[-1].deployments] == ["deployments/b"])
        watching.cancel()
    revisions = [snapshot.revision for snapshot in sent]
    assert revisions == sorted(revisions)
    by_revision: dict[int, Any] = {}
    for snapshot in sent:
        content = by_revision.setdefault(snapshot.revision, snapshot.deployments)
        assert content == snapshot.deployments


async def test_open_watches_do_not_delay_the_shutdown(tmp_path):
    """SIGTERM ends the watches; otherwise each restart would take the full drain time."""
    async with (
        running_service("registry", tmp_path, HEADRACE_DRAIN_SECONDS="12") as service,
        service.channel() as channel,
    ):
        watch = RegistryClient(channel).watch()
        await watch.read()
        started = time.monotonic()
        assert await service.terminate() == 0
        assert time.monotonic() - started < 10


async def test_a_full_disk_is_reported_and_nothing_is_stored(tmp_path):
    """The registry continues; what fits is still stored."""

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * MIB, 3 * MIB))

    async with (
        running_service("registry", tmp_path, preexec=limit_files) as service,
        service.channel() as channel,
    ):
        registry = RegistryClient(channel)
        with pytest.raises(Unavailable) as raised, headrace_errors():
            await registry.upload(artifact(payload=b"w" * 4 * MIB))
        assert raised.value.reason == "DEPENDENCY_UNAVAILABLE"
        assert raised.value.metadata == {"dependency": "artifact store"}
        assert raised.value.retry_after_seconds == 60.0
        assert files(tmp_path) == []
        assert await registry.upload(artifact())
