"""The router's parts, put together."""

from __future__ import annotations

from libs.runtime import prepare

prepare()

from headrace.registry.v1 import registry_pb2, registry_pb2_grpc
from headrace.router.v1 import router_pb2_grpc

from libs.process import process, run
from libs.rpc.channel import open_channel
from libs.rpc.watch import SnapshotWatch
from services.router.config import Settings
from services.router.servicer import RouterServicer
from services.router.snapshots import RouteSnapshots


async def main() -> None:
    """Runs the service until it is told to end; it is ready once the registry has been heard."""
    settings = Settings()
    async with process("router", settings) as running:
        snapshots = RouteSnapshots()
        registry = registry_pb2_grpc.RegistryServiceStub(
            open_channel(settings.registry_address, traced=False)
        )
        deployments = SnapshotWatch(
            "registry",
            open_stream=lambda: registry.WatchDeployments(registry_pb2.WatchDeploymentsRequest()),
            on_snapshot=snapshots.take,
            clock=running.clock,
        )
        router_pb2_grpc.add_RouterServiceServicer_to_server(
            RouterServicer(snapshots), running.server.grpc
        )

        async def become_ready() -> None:
            await deployments.wait_first()
            await running.server.set_ready(True)

        running.spawn(deployments.run())
        running.spawn(become_ready())
        running.on_drain(snapshots.close)
        await running.serve(ready=False)


if __name__ == "__main__":
    run(main())
