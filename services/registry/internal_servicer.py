"""`RegistryInternalService`: what other services of the mesh ask the registry for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import closing

import structlog
from headrace.registry.v1 import registry_internal_pb2 as pb
from headrace.registry.v1 import registry_internal_pb2_grpc
from typing_extensions import override

from libs.clock import Clock
from libs.errors import NotFound
from libs.rpc.identity import Context
from libs.rpc.names import parse_name
from services.registry.artifacts import CHUNK_BYTES, ArtifactStore
from services.registry.feed import DeploymentFeed
from services.registry.rules import check_backend, check_digest
from services.registry.store import RegistryStore
from services.registry.wire import report_from_proto

_log = structlog.get_logger()


class RegistryInternalServicer(registry_internal_pb2_grpc.RegistryInternalServiceServicer):
    """Sends deployments and artifacts to pools, and stores what their backends report."""

    def __init__(
        self,
        *,
        store: RegistryStore,
        artifacts: ArtifactStore,
        feed: DeploymentFeed,
        clock: Clock,
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._feed = feed
        self._clock = clock

    @override
    async def WatchDeployments(
        self, request: pb.WatchDeploymentsRequest, _context: Context
    ) -> AsyncIterator[pb.WatchDeploymentsResponse]:
        async for snapshot in self._feed.watch(request.pool):
            yield snapshot

    @override
    async def ReportBackend(
        self, request: pb.ReportBackendRequest, _context: Context
    ) -> pb.ReportBackendResponse:
        deployment = parse_name(request.deployment, "deployments", field="deployment")
        backend = check_backend(report_from_proto(request.backend, now=self._clock.now()))
        if await self._store.put_backend(deployment, backend):
            _log.info(
                "backend reported",
                deployment=request.deployment,
                backend=backend.id,
                state=backend.state.value,
            )
            self._feed.changed()
        return pb.ReportBackendResponse()

    @override
    async def DownloadArtifact(
        self, request: pb.DownloadArtifactRequest, _context: Context
    ) -> AsyncIterator[pb.DownloadArtifactResponse]:
        digest = check_digest(request.digest, field="digest")
        artifact = await asyncio.to_thread(self._artifacts.open, digest)
        if artifact is None:
            raise NotFound.of_resource(f"artifacts/{digest}")
        with closing(artifact):
            while chunk := await asyncio.to_thread(artifact.read, CHUNK_BYTES):
                yield pb.DownloadArtifactResponse(chunk=chunk)
