"""The router between a registry that restarts and readers that stay."""

from __future__ import annotations

import asyncio

import pytest
from headrace.common.v1 import backend_pb2, model_pb2
from headrace.router.v1 import (
    router_internal_pb2,
    router_internal_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
)

from libs.clock import SystemClock
from libs.errors import NotFound, Unavailable
from libs.rpc.status import headrace_errors
from libs.rpc.watch import SnapshotWatch
from tests.support.registry import SERVICE, USER, RegistryClient, backend, ready_backend
from tests.support.service import RunningService, running_service

pytestmark = pytest.mark.integration

VERSION = "models/smollm2/versions/{}"


class Mesh:
    """A registry and a router, each a process."""

    def __init__(self, registry: RunningService, router: RunningService) -> None:
        self.registry = registry
        self.router = router

    async def register(self, *versions: str) -> str:
        async with self.registry.channel() as channel:
            return await RegistryClient(channel).register("smollm2", *versions)

    async def deploy(self, version: str) -> None:
        async with self.registry.channel() as channel:
            await RegistryClient(channel).deploy(name(version), VERSION.format(version))

    async def undeploy(self, version: str) -> None:
        async with self.registry.channel() as channel:
            await RegistryClient(channel).undeploy(name(version))

    async def update(self, version: str, new_version: str) -> None:
        async with self.registry.channel() as channel:
            await RegistryClient(channel).update(name(version), version=VERSION.format(new_version))

    async def report(
        self, version: str, digest: str, report: backend_pb2.Backend | None = None
    ) -> None:
        """Reports a ready backend, or another report."""
        async with self.registry.channel() as channel:
            await RegistryClient(channel).report(name(version), report or ready_backend(digest))

    async def route(self, model: str) -> router_pb2.RouteResponse:
        async with self.router.channel() as channel:
            with headrace_errors():
                answer = await router_pb2_grpc.RouterServiceStub(channel).Route(
                    router_pb2.RouteRequest(model=model), metadata=USER, timeout=5
                )
        assert isinstance(answer, router_pb2.RouteResponse)
        return answer


class Reader:
    """A service that takes requests: it has the newest snapshot, whatever happens to the router."""

    def __init__(self, router: RunningService) -> None:
        self.snapshot = router_internal_pb2.WatchRoutesResponse()
        self._channel = router.channel()
        stub = router_internal_pb2_grpc.RouterInternalServiceStub(self._channel)
        self._watch = SnapshotWatch(
            "router",
            open_stream=lambda: stub.WatchRoutes(
                router_internal_pb2.WatchRoutesRequest(), metadata=SERVICE
            ),
            on_snapshot=self._take,
            clock=SystemClock(),
        )
        self._received = asyncio.Event()
        self._running = asyncio.create_task(self._watch.run())

    def _take(self, snapshot: router_internal_pb2.WatchRoutesResponse) -> None:
        self.snapshot = snapshot
        self._received.set()

    def ready(self) -> list[str]:
        """Returns the versions of the snapshot that have a ready backend, best first."""
        return [
            target.model_version.rpartition("/")[2]
            for route in self.snapshot.routes
            for target in route.targets
            if target.backends
        ]

    async def sees(self, *versions: str) -> None:
        """Waits until exactly these versions are ready, in this order."""
        async with asyncio.timeout(15):
            while self.ready() != list(versions):
                self._received.clear()
                await self._received.wait()

    async def close(self) -> None:
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        await self._channel.close(None)


def name(version: str) -> str:
    return f"deployments/v{version.replace('.', '-')}"


@pytest.fixture
async def mesh(tmp_path):
    for service in ("registry", "router"):
        (tmp_path / service).mkdir()
    async with (
        running_service("registry", tmp_path / "registry") as registry,
        running_service(
            "router", tmp_path / "router", HEADRACE_REGISTRY_ADDRESS=registry.address
        ) as router,
    ):
        await router.healthy()
        yield Mesh(registry, router)


@pytest.fixture
async def reader(mesh):
    reading = Reader(mesh.router)
    yield reading
    await reading.close()


async def test_a_route_follows_what_is_ready(mesh, reader):
    """Nothing, then the only version, then the higher one, then the only one left."""
    with pytest.raises(NotFound) as unknown:
        await mesh.route("smollm2")
    assert unknown.value.metadata == {"model": "smollm2", "models": ""}
    digest = await mesh.register("1.9.0", "1.10.0")
    await mesh.deploy("1.9.0")
    await mesh.deploy("1.10.0")
    await mesh.report("1.9.0", digest)
    await reader.sees("1.9.0")
    answer = await mesh.route("smollm2")
    assert answer.model_version == VERSION.format("1.9.0")
    assert answer.route.reason == "highest ready version: 1.9.0"
    with pytest.raises(Unavailable) as loading:
        await mesh.route("smollm2@1.10.0")
    assert loading.value.reason == "MODEL_NOT_READY"
    assert loading.value.retry_after_seconds == 1.0
    await mesh.report("1.10.0", digest)
    await reader.sees("1.10.0", "1.9.0")
    answer = await mesh.route("smollm2")
    assert answer.route.deployment == name("1.10.0")
    assert answer.route.epoch == reader.snapshot.epoch != ""
    assert answer.route.revision == reader.snapshot.revision
    assert answer.artifact_digest == digest
    (status,) = answer.backends
    assert (status.id, status.state) == ("triton-0", model_pb2.BACKEND_STATE_READY)
    assert status.HasField("update_time")
    assert (await mesh.route("smollm2@1.9.0")).route.deployment == name("1.9.0")
    await mesh.undeploy("1.10.0")
    await reader.sees("1.9.0")


async def test_an_updated_deployment_is_routed_by_its_new_version(mesh, reader):
    """As soon as a backend has it ready, and no longer under the old one's name."""
    digest = await mesh.register("1.0.0", "2.0.0")
    await mesh.deploy("1.0.0")
    await mesh.report("1.0.0", digest)
    await reader.sees("1.0.0")
    await mesh.update("1.0.0", "2.0.0")
    await reader.sees()
    await mesh.report("1.0.0", digest)
    await reader.sees("2.0.0")
    answer = await mesh.route("smollm2@2.0.0")
    assert answer.route.deployment == name("1.0.0")
    with pytest.raises(NotFound):
        await mesh.route("smollm2@1.0.0")


async def test_while_the_registry_is_down_routes_stay_for_new_readers_too(mesh, reader):
    """And when it is back, its changes arrive again."""
    digest = await mesh.register("1.0.0", "2.0.0")
    await mesh.deploy("1.0.0")
    await mesh.report("1.0.0", digest)
    await reader.sees("1.0.0")
    await mesh.registry.kill()
    assert (await mesh.route("smollm2")).route.deployment == name("1.0.0")
    late = Reader(mesh.router)
    await late.sees("1.0.0")
    await late.close()
    assert await mesh.router.health() == "SERVING"
    await mesh.registry.start()
    await mesh.deploy("2.0.0")
    await mesh.report("2.0.0", digest)
    await reader.sees("2.0.0", "1.0.0")


async def test_a_router_that_has_not_reached_the_registry_is_not_ready(mesh, reader):
    """Health and calls show it, and it serves once the registry is back."""
    digest = await mesh.register("1.0.0")
    await mesh.deploy("1.0.0")
    await mesh.report("1.0.0", digest)
    await reader.sees("1.0.0")
    await mesh.registry.kill()
    await mesh.router.kill()
    await mesh.router.start()
    assert await mesh.router.health() == "NOT_SERVING"
    with pytest.raises(Unavailable) as raised:
        await mesh.route("smollm2")
    assert raised.value.reason == "DEPENDENCY_UNAVAILABLE"
    assert raised.value.metadata == {"dependency": "registry"}
    assert reader.ready() == ["1.0.0"]
    await mesh.registry.start()
    await mesh.router.healthy()
    assert (await mesh.route("smollm2")).route.deployment == name("1.0.0")


async def test_a_reader_keeps_its_routes_while_the_router_is_down(mesh, reader):
    """It continues with its snapshot and gets the newest when the router is back."""
    digest = await mesh.register("1.0.0")
    await mesh.deploy("1.0.0")
    await mesh.report("1.0.0", digest)
    await reader.sees("1.0.0")
    await mesh.router.kill()
    await mesh.report("1.0.0", digest, backend())
    assert reader.ready() == ["1.0.0"]
    before = reader.snapshot
    await mesh.router.start()
    await reader.sees()
    assert reader.snapshot.epoch != before.epoch


async def test_the_router_stops_at_once_with_readers_or_without_a_registry(mesh, reader):
    """Neither its watches nor its waiting delay SIGTERM."""
    assert await mesh.router.terminate() == 0
    await mesh.registry.kill()
    await mesh.router.start()
    assert await mesh.router.terminate() == 0
