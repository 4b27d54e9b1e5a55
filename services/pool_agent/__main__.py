"""Puts the parts of the pool agent together and runs it."""

from __future__ import annotations

from libs.runtime import prepare

prepare()

import asyncio

from headrace.registry.v1 import registry_internal_pb2, registry_internal_pb2_grpc

from libs.process import process, run
from libs.rpc.channel import open_channel
from libs.rpc.identity import mesh_identity
from libs.rpc.watch import SnapshotWatch
from services.pool_agent.config import Settings
from services.pool_agent.domain import Report
from services.pool_agent.download import Downloads
from services.pool_agent.pool import Pool
from services.pool_agent.reconciler import ReconcileIntervals, ReconcilerParts
from services.pool_agent.reporter import Reporter
from services.pool_agent.repository import ModelRepository
from services.pool_agent.triton import Triton
from services.pool_agent.wire import report_to_proto, reports_from_proto, wanted_from_proto

REPORT_SECONDS = 5.0


async def main() -> None:
    """Runs the agent until the process is asked to stop; ready once the registry has answered."""
    settings = Settings()
    async with process("pool_agent", settings) as running:
        registry = registry_internal_pb2_grpc.RegistryInternalServiceStub(
            open_channel(settings.registry_address, tls=settings.tls, traced=False)
        )
        caller = mesh_identity(settings.backend_id).metadata()
        limit_bytes = settings.artifact_limit_bytes
        repository = ModelRepository(settings.model_repository, limit_bytes=limit_bytes)
        await asyncio.to_thread(repository.open)

        async def send(deployment: str, report: Report) -> None:
            backend = report_to_proto(
                report, backend_id=settings.backend_id, address=settings.triton_address
            )
            request = registry_internal_pb2.ReportBackendRequest(
                deployment=deployment, backend=backend
            )
            await registry.ReportBackend(request, metadata=caller, timeout=REPORT_SECONDS)

        reporter = Reporter(send, running.clock)
        parts = ReconcilerParts(
            repository=repository,
            downloads=Downloads(
                lambda digest: registry.DownloadArtifact(
                    registry_internal_pb2.DownloadArtifactRequest(digest=digest), metadata=caller
                ),
                limit_bytes=limit_bytes,
            ),
            triton=_triton(settings),
            clock=running.clock,
            intervals=ReconcileIntervals(),
        )
        pool = Pool(parts, reporter)

        def take(snapshot: registry_internal_pb2.WatchDeploymentsResponse) -> None:
            # Both are read before either is used: a snapshot that cannot be read changes nothing.
            reports = reports_from_proto(snapshot.deployments, settings.backend_id)
            wanted = wanted_from_proto(snapshot.deployments)
            reporter.received(reports)
            pool.want(wanted)

        deployments = SnapshotWatch(
            "registry",
            open_stream=lambda: registry.WatchDeployments(
                registry_internal_pb2.WatchDeploymentsRequest(pool=settings.pool), metadata=caller
            ),
            on_snapshot=take,
            clock=running.clock,
        )

        async def become_ready() -> None:
            await deployments.wait_first()
            await running.set_ready()

        running.spawn(deployments.run())
        running.spawn(reporter.run())
        running.spawn(pool.run())
        running.spawn(become_ready())
        await running.serve(ready=False)


def _triton(settings: Settings) -> Triton:
    key_file = settings.triton_control_key_file
    return Triton(
        open_channel(settings.triton_address, tls=settings.tls, traced=False, retries=False),
        control_key=key_file.read_text() if key_file else "",
    )


if __name__ == "__main__":
    run(main())
