"""Whoever watches deployments hears of each change, at once and in order."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from headrace.common.v1 import model_pb2
from headrace.registry.v1 import registry_pb2 as pb

from services.registry import feed
from tests.support.registry import RegistryClient, serving_registry

pytestmark = pytest.mark.integration

VERSION = "models/smollm2/versions/1.0.0"


@pytest.fixture
def url(tmp_path):
    return f"sqlite+aiosqlite:///{tmp_path}/registry.db"


@pytest.fixture
async def registry(url, tmp_path, monkeypatch):
    """A registry that hears of its own changes only: a poll does not come before the test ends."""
    monkeypatch.setattr(feed, "POLL_SECONDS", 3600)
    async with serving_registry(url, tmp_path) as client:
        yield client


def names(snapshot: pb.WatchDeploymentsResponse) -> list[str]:
    return [one.name for one in snapshot.deployments]


def failed(message: str) -> model_pb2.Backend:
    return model_pb2.Backend(id="triton-0", state=model_pb2.BACKEND_STATE_FAILED, message=message)


async def following(call: Any) -> pb.WatchDeploymentsResponse:
    """Returns the next snapshot of a watch."""
    async with asyncio.timeout(10):
        told = await call.read()
    assert isinstance(told, pb.WatchDeploymentsResponse)
    return told


async def nothing_follows(call: Any) -> None:
    """Fails if the watch tells anything within a while that is long for a push."""
    reading = asyncio.ensure_future(call.read())
    done, _ = await asyncio.wait([reading], timeout=0.3)
    assert not done, reading.result()
    reading.cancel()


async def test_a_watch_tells_what_there_is_and_then_each_change(registry):
    """The whole state each time, under a revision that grows."""
    digest = await registry.register("smollm2", "1.0.0")
    watch = registry.stub.WatchDeployments(pb.WatchDeploymentsRequest())
    told = [await following(watch)]
    assert names(told[-1]) == []
    await registry.deploy("deployments/b", VERSION)
    told.append(await following(watch))
    assert names(told[-1]) == ["deployments/b"]
    await registry.deploy("deployments/a", VERSION)
    told.append(await following(watch))
    assert names(told[-1]) == ["deployments/a", "deployments/b"]
    ready = model_pb2.Backend(
        id="triton-0",
        address="127.0.0.1:1",
        backend_model="m",
        state=model_pb2.BACKEND_STATE_READY,
        artifact_digest=digest,
        kind=model_pb2.BACKEND_KIND_TRITON,
    )
    await registry.report("deployments/a", ready)
    told.append(await following(watch))
    assert list(told[-1].deployments[0].backends) == [ready]
    await registry.undeploy("deployments/a")
    told.append(await following(watch))
    assert names(told[-1]) == ["deployments/b"]
    revisions = [snapshot.revision for snapshot in told]
    assert revisions == sorted(set(revisions))


async def test_what_changes_nothing_is_not_told(registry):
    """Agents repeat themselves; watchers need not hear it."""
    await registry.register("smollm2", "1.0.0")
    await registry.deploy("deployments/a", VERSION)
    loading = model_pb2.Backend(id="triton-0", state=model_pb2.BACKEND_STATE_LOADING)
    await registry.report("deployments/a", loading)
    watch = registry.stub.WatchDeployments(pb.WatchDeploymentsRequest())
    before = await following(watch)
    await registry.report("deployments/a", loading)
    await registry.create_model("minilm")
    await nothing_follows(watch)
    again = registry.stub.WatchDeployments(pb.WatchDeploymentsRequest())
    assert (await following(again)).revision == before.revision


async def test_a_watch_of_a_pool_tells_that_pool_only(registry):
    """What other pools do is no news to it."""
    await registry.register("smollm2", "1.0.0")
    watch = registry.stub.WatchDeployments(pb.WatchDeploymentsRequest(pool="gpu"))
    assert names(await following(watch)) == []
    await registry.deploy("deployments/a", VERSION)
    await registry.deploy("deployments/b", VERSION, pool="gpu")
    assert names(await following(watch)) == ["deployments/b"]
    await registry.undeploy("deployments/a")
    await nothing_follows(watch)


async def test_a_reader_that_stands_still_is_told_the_newest(registry):
    """It costs no queue: what was replaced before it could be sent is never sent."""
    await registry.register("smollm2", "1.0.0")
    message = "x" * 2000
    for number in range(50):
        await registry.deploy(f"deployments/d{number}", VERSION)
        await registry.report(f"deployments/d{number}", failed(message))
    small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
    async with grpc.aio.insecure_channel(registry.address, options=small_window) as channel:
        watch = RegistryClient(channel).stub.WatchDeployments(pb.WatchDeploymentsRequest())
        first = await following(watch)
        # Each state has 100 kB, more than gRPC sends ahead to this reader, which does not read.
        for number in range(50):
            await registry.report("deployments/d0", failed(f"{number} {message}"))
        told = [first]
        while not told[-1].deployments[0].backends[0].message.startswith("49 "):
            told.append(await following(watch))
        assert told[-1].revision == first.revision + 50
        assert len(told) < 25
        await nothing_follows(watch)


async def test_a_change_by_another_replica_is_told_too(url, tmp_path):
    """Replicas share a database; each looks there for what the others changed."""
    async with serving_registry(url, tmp_path) as one, serving_registry(url, tmp_path) as other:
        watch = other.stub.WatchDeployments(pb.WatchDeploymentsRequest())
        assert names(await following(watch)) == []
        await one.register("smollm2", "1.0.0")
        await one.deploy("deployments/a", VERSION)
        assert names(await following(watch)) == ["deployments/a"]
