"""Puts the parts of the registry together and serves."""

from __future__ import annotations

from libs.runtime import prepare

prepare()

from headrace.registry.v1 import registry_internal_pb2_grpc, registry_pb2_grpc

from libs.db import create_engine, migrate
from libs.http_client import AddressPolicy
from libs.process import process, run
from services.registry.artifacts import open_store
from services.registry.config import Settings
from services.registry.feed import DeploymentFeed
from services.registry.internal_servicer import RegistryInternalServicer
from services.registry.provider_hosts import ProviderHosts
from services.registry.servicer import RegistryServicer
from services.registry.store import RegistryStore
from services.registry.upload import UploadLimits


async def main() -> None:
    """Runs the service until the process is asked to stop."""
    settings = Settings()
    async with process("registry", settings) as running:
        await migrate(settings.database_url, "registry")
        engine = create_engine(settings.database_url)
        store = RegistryStore(engine)
        feed = DeploymentFeed(store)
        artifacts = open_store(settings.artifact_url)
        servicer = RegistryServicer(
            store=store,
            artifacts=artifacts,
            feed=feed,
            limits=UploadLimits(
                size_bytes=settings.artifact_limit_bytes,
                idle_seconds=settings.upload_idle_seconds,
                concurrent=settings.upload_limit,
                bytes_per_second=settings.upload_bytes_per_second,
            ),
            provider_hosts=ProviderHosts(
                AddressPolicy.parse(
                    settings.provider_allowed_networks,
                    private=settings.provider_private_networks,
                )
            ),
            clock=running.clock,
        )
        internal = RegistryInternalServicer(
            store=store, artifacts=artifacts, feed=feed, clock=running.clock
        )
        server = running.server.grpc
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(servicer, server)
        registry_internal_pb2_grpc.add_RegistryInternalServiceServicer_to_server(internal, server)
        await feed.refresh()
        running.spawn(feed.run())
        running.on_drain(feed.close)
        await running.serve()
        await engine.dispose()


if __name__ == "__main__":
    run(main())
