"""A watch of deployments gets each change, at once and in order."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from headrace.common.v1 import backend_pb2, model_pb2
from headrace.registry.v1 import registry_internal_pb2 as pb

from services.registry import feed
from tests.support.registry import RegistryClient, backend, ready_backend, serving_registry

pytestmark = pytest.mark.integration

VERSION = "models/smollm2/versions/1.0.0"


@pytest.fixture
def url(tmp_path):
    return f"sqlite+aiosqlite:///{tmp_path}/registry.db"


@pytest.fixture
async def registry(url, tmp_path, monkeypatch):
    """A registry that sees its own changes only: it does not poll before the test ends."""
    monkeypatch.setattr(feed, "POLL_SECONDS", 3600)
    async with serving_registry(url, tmp_path) as client:
        yield client


def names(snapshot: pb.WatchDeploymentsResponse) -> list[str]:
    return [one.name for one in snapshot.deployments]


async def following(call: Any) -> pb.WatchDeploymentsResponse:
    """Returns the next snapshot of a watch."""
    async with asyncio.timeout(10):
        snapshot = await call.read()
    assert isinstance(snapshot, pb.WatchDeploymentsResponse)
    return snapshot


def backends(snapshot: pb.WatchDeploymentsResponse, index: int = 0) -> list[backend_pb2.Backend]:
    """Returns the backends of a deployment without the times of their reports."""
    found = list(snapshot.deployments[index].backends)
    for one in found:
        one.status.ClearField("update_time")
    return found


async def nothing_follows(call: Any) -> None:
    """Fails if the watch sends anything within a time that is long for a push."""
    reading = asyncio.ensure_future(call.read())
    done, _ = await asyncio.wait([reading], timeout=0.3)
    assert not done, reading.result()
    reading.cancel()


async def test_a_watch_sends_the_deployments_and_then_each_change(registry):
    """The full state each time, with a growing revision."""
    digest = await registry.register("smollm2", "1.0.0")
    watch = registry.watch()
    sent = [await following(watch)]
    assert names(sent[-1]) == []
    await registry.deploy("deployments/b", VERSION)
    sent.append(await following(watch))
    assert names(sent[-1]) == ["deployments/b"]
    await registry.deploy("deployments/a", VERSION)
    sent.append(await following(watch))
    assert names(sent[-1]) == ["deployments/a", "deployments/b"]
    ready = ready_backend(digest)
    await registry.report("deployments/a", ready)
    sent.append(await following(watch))
    assert backends(sent[-1]) == [ready]
    await registry.undeploy("deployments/a")
    sent.append(await following(watch))
    assert names(sent[-1]) == ["deployments/b"]
    revisions = [snapshot.revision for snapshot in sent]
    assert revisions == sorted(set(revisions))


async def test_what_changes_nothing_is_not_sent(registry):
    """Agents repeat reports; watches need not get them."""
    await registry.register("smollm2", "1.0.0")
    await registry.deploy("deployments/a", VERSION)
    loading = backend(state=model_pb2.BACKEND_STATE_LOADING)
    await registry.report("deployments/a", loading)
    watch = registry.watch()
    before = await following(watch)
    await registry.report("deployments/a", loading)
    await registry.create_model("minilm")
    await nothing_follows(watch)
    again = registry.watch()
    assert (await following(again)).revision == before.revision


async def test_a_watch_of_a_pool_sends_that_pool_only(registry):
    """Changes of other pools are not sent."""
    await registry.register("smollm2", "1.0.0")
    watch = registry.watch("gpu")
    assert names(await following(watch)) == []
    await registry.deploy("deployments/a", VERSION)
    await registry.deploy("deployments/b", VERSION, pool="gpu")
    assert names(await following(watch)) == ["deployments/b"]
    await registry.undeploy("deployments/a")
    await nothing_follows(watch)


async def test_a_slow_reader_gets_the_newest_snapshot(registry):
    """There is no queue: a snapshot that is replaced before it is sent is never sent."""
    await registry.register("smollm2", "1.0.0")
    message = "x" * 2000
    for number in range(50):
        await registry.deploy(f"deployments/d{number}", VERSION)
        await registry.report(f"deployments/d{number}", backend(message=message))
    small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
    async with grpc.aio.insecure_channel(registry.address, options=small_window) as channel:
        watch = RegistryClient(channel).watch()
        first = await following(watch)
        # A snapshot has 100 kB, more than gRPC sends ahead to a reader that does not read.
        for number in range(50):
            await registry.report("deployments/d0", backend(message=f"{number} {message}"))
        sent = [first]
        while not backends(sent[-1])[0].status.message.startswith("49 "):
            sent.append(await following(watch))
        assert sent[-1].revision == first.revision + 50
        assert len(sent) < 25
        await nothing_follows(watch)


async def test_a_change_by_another_replica_is_sent_too(url, tmp_path):
    """Replicas share a database; each polls it for changes by the others."""
    async with serving_registry(url, tmp_path) as one, serving_registry(url, tmp_path) as other:
        watch = other.watch()
        assert names(await following(watch)) == []
        await one.register("smollm2", "1.0.0")
        await one.deploy("deployments/a", VERSION)
        assert names(await following(watch)) == ["deployments/a"]
