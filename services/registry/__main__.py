"""The registry's parts, put together."""

from __future__ import annotations

from libs.runtime import prepare

prepare()

from headrace.registry.v1 import registry_pb2_grpc

from libs.db import create_engine, migrate
from libs.process import process, run
from services.registry.artifacts import open_store
from services.registry.config import Settings
from services.registry.feed import DeploymentFeed
from services.registry.servicer import RegistryServicer
from services.registry.store import RegistryStore
from services.registry.upload import UploadLimits


async def main() -> None:
    """Runs the service until it is told to end."""
    settings = Settings()
    async with process("registry", settings) as running:
        await migrate(settings.database_url, "registry")
        engine = create_engine(settings.database_url)
        store = RegistryStore(engine)
        feed = DeploymentFeed(store)
        servicer = RegistryServicer(
            store=store,
            artifacts=open_store(settings.artifact_url),
            feed=feed,
            limits=UploadLimits(
                size_bytes=settings.artifact_limit_bytes,
                idle_seconds=settings.upload_idle_seconds,
                concurrent=settings.upload_limit,
            ),
            clock=running.clock,
        )
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(servicer, running.server.grpc)
        await feed.refresh()
        running.spawn(feed.run())
        running.on_drain(feed.close)
        await running.serve()
        await engine.dispose()


if __name__ == "__main__":
    run(main())
