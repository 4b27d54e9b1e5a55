"""Puts the parts of the router together and serves."""

from __future__ import annotations

from libs.runtime import prepare

prepare()

import uuid

from headrace.registry.v1 import registry_internal_pb2, registry_internal_pb2_grpc
from headrace.router.v1 import router_internal_pb2_grpc, router_pb2_grpc

from libs.process import process, run
from libs.rpc.channel import open_channel
from libs.rpc.identity import mesh_identity
from libs.rpc.watch import SnapshotWatch
from services.router.config import Settings
from services.router.servicer import RouterInternalServicer, RouterServicer
from services.router.snapshots import RouteSnapshots


async def main() -> None:
    """Runs the service until the process is asked to stop; ready once the registry has answered."""
    settings = Settings()
    async with process("router", settings) as running:
        caller = mesh_identity("router").metadata()
        snapshots = RouteSnapshots(epoch=str(uuid.uuid4()))
        registry = registry_internal_pb2_grpc.RegistryInternalServiceStub(
            open_channel(settings.registry_address, tls=settings.tls, traced=False)
        )
        deployments = SnapshotWatch(
            "registry",
            open_stream=lambda: registry.WatchDeployments(
                registry_internal_pb2.WatchDeploymentsRequest(), metadata=caller
            ),
            on_snapshot=snapshots.take,
            clock=running.clock,
        )
        server = running.server.grpc
        router_pb2_grpc.add_RouterServiceServicer_to_server(RouterServicer(snapshots), server)
        router_internal_pb2_grpc.add_RouterInternalServiceServicer_to_server(
            RouterInternalServicer(snapshots), server
        )

        async def become_ready() -> None:
            await deployments.wait_first()
            await running.set_ready()

        running.spawn(deployments.run())
        running.spawn(become_ready())
        running.on_drain(snapshots.close)
        await running.serve(ready=False)


if __name__ == "__main__":
    run(main())
