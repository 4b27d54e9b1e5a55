"""The pool agent's parts, put together."""

from __future__ import annotations

from headrace.registry.v1 import registry_pb2, registry_pb2_grpc

from libs.process import process, run
from libs.rpc.channel import open_channel
from libs.rpc.watch import SnapshotWatch
from services.pool_agent.agent import PoolAgent
from services.pool_agent.config import Settings
from services.pool_agent.repository import ModelRepository
from services.pool_agent.triton import TritonControl


async def main() -> None:
    """Runs the agent until it is told to end. What Triton has loaded goes on serving."""
    settings = Settings()
    async with process("pool_agent", settings) as running:
        registry = registry_pb2_grpc.RegistryServiceStub(
            open_channel(settings.registry_address, traced=False)
        )
        agent = PoolAgent(
            registry=registry,
            triton=TritonControl(
                open_channel(settings.triton_address, traced=False, retries=False)
            ),
            repository=ModelRepository(settings.model_repository),
            backend_id=settings.backend_id,
            triton_address=settings.triton_address,
            clock=running.clock,
        )
        request = registry_pb2.WatchDeploymentsRequest(pool=settings.pool)
        deployments = SnapshotWatch(
            "registry",
            open_stream=lambda: registry.WatchDeployments(request),
            on_snapshot=agent.take,
            clock=running.clock,
        )
        running.spawn(deployments.run())
        running.spawn(agent.run())
        await running.serve()


if __name__ == "__main__":
    run(main())
