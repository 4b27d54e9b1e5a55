"""The RPCs: each reads its request, asks the domain and the store, and answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import closing

import structlog
from headrace.registry.v1 import registry_pb2 as pb
from headrace.registry.v1 import registry_pb2_grpc
from typing_extensions import override

from libs.clock import Clock
from libs.errors import FailedPrecondition, NotFound
from libs.model_reference import parse_version_name
from libs.rpc.identity import Context, Identity
from libs.rpc.names import parse_name
from libs.rpc.paging import PageRequest
from services.registry.access import require_admin, require_admin_or_mesh
from services.registry.artifacts import CHUNK_BYTES, ArtifactStore
from services.registry.domain import (
    Deployment,
    ModelVersion,
    check_backend,
    check_digest,
    check_lineage,
    check_pool,
    new_model,
)
from services.registry.feed import DeploymentFeed
from services.registry.manifest import manifest_of_artifact
from services.registry.metrics import ARTIFACT_BYTES
from services.registry.store import RegistryStore
from services.registry.upload import Upload, UploadLimits, UploadSlots
from services.registry.wire import (
    backend_from_proto,
    deployment_to_proto,
    lineage_from_proto,
    model_to_proto,
    version_to_proto,
)

_log = structlog.get_logger()


class RegistryServicer(registry_pb2_grpc.RegistryServiceServicer):
    """Knows every model, version, artifact and deployment."""

    def __init__(
        self,
        *,
        store: RegistryStore,
        artifacts: ArtifactStore,
        feed: DeploymentFeed,
        limits: UploadLimits,
        clock: Clock,
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._feed = feed
        self._limits = limits
        self._slots = UploadSlots(limits.concurrent)
        self._clock = clock

    @override
    async def CreateModel(
        self, request: pb.CreateModelRequest, context: Context
    ) -> pb.CreateModelResponse:
        caller = require_admin(context)
        model = new_model(
            name=request.model.name,
            description=request.model.description,
            now=self._clock.now(),
        )
        await self._store.insert_model(model)
        _changed("model created", caller, name=model.name)
        return pb.CreateModelResponse(model=model_to_proto(model))

    @override
    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        model = await self._store.get_model(parse_name(request.name, "models"))
        return pb.GetModelResponse(model=model_to_proto(model))

    @override
    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        page = await self._store.list_models(
            PageRequest.parse(request.page_size, request.page_token)
        )
        return pb.ListModelsResponse(
            models=map(model_to_proto, page.rows), next_page_token=page.next_page_token
        )

    @override
    async def UploadArtifact(
        self, request_iterator: AsyncIterator[pb.UploadArtifactRequest], context: Context
    ) -> pb.UploadArtifactResponse:
        caller = require_admin(context)
        with self._slots.slot():
            upload = Upload(aiter(request_iterator), limits=self._limits)
            metadata = await upload.announced()
            await self._artifacts.put(
                metadata.digest, size_bytes=metadata.size_bytes, chunks=upload.chunks()
            )
        ARTIFACT_BYTES.inc(metadata.size_bytes)
        _changed("artifact kept", caller, digest=metadata.digest, size_bytes=metadata.size_bytes)
        return pb.UploadArtifactResponse(digest=metadata.digest, size_bytes=metadata.size_bytes)

    @override
    async def DownloadArtifact(
        self, request: pb.DownloadArtifactRequest, context: Context
    ) -> AsyncIterator[pb.DownloadArtifactResponse]:
        require_admin_or_mesh(context)
        digest = check_digest(request.digest, field="digest")
        artifact = await asyncio.to_thread(self._artifacts.open, digest)
        if artifact is None:
            raise NotFound.of_resource(f"artifacts/{digest}")
        with closing(artifact):
            while chunk := await asyncio.to_thread(artifact.read, CHUNK_BYTES):
                yield pb.DownloadArtifactResponse(chunk=chunk)

    @override
    async def CreateModelVersion(
        self, request: pb.CreateModelVersionRequest, context: Context
    ) -> pb.CreateModelVersionResponse:
        caller = require_admin(context)
        asked = request.model_version
        model, version = parse_version_name(asked.name, field="model_version.name")
        digest = check_digest(asked.artifact_digest, field="model_version.artifact_digest")
        lineage = check_lineage(lineage_from_proto(asked.lineage))
        await self._store.get_model(model)
        manifest = await asyncio.to_thread(manifest_of_artifact, self._artifacts, digest)
        created = ModelVersion(
            model=model,
            version=version,
            artifact_digest=digest,
            schema=manifest.schema,
            lineage=lineage,
            create_time=self._clock.now(),
            provider=manifest.provider,
        )
        await self._store.insert_version(created)
        _changed("version created", caller, name=created.name, artifact_digest=digest)
        return pb.CreateModelVersionResponse(model_version=version_to_proto(created))

    @override
    async def GetModelVersion(
        self, request: pb.GetModelVersionRequest, context: Context
    ) -> pb.GetModelVersionResponse:
        found = await self._store.find_version(*parse_version_name(request.name))
        if found is None:
            raise NotFound.of_resource(request.name)
        return pb.GetModelVersionResponse(model_version=version_to_proto(found))

    @override
    async def ListModelVersions(
        self, request: pb.ListModelVersionsRequest, context: Context
    ) -> pb.ListModelVersionsResponse:
        page = await self._store.list_versions(
            parse_name(request.parent, "models", field="parent"),
            PageRequest.parse(request.page_size, request.page_token),
        )
        return pb.ListModelVersionsResponse(
            model_versions=map(version_to_proto, page.rows), next_page_token=page.next_page_token
        )

    @override
    async def CreateDeployment(
        self, request: pb.CreateDeploymentRequest, context: Context
    ) -> pb.CreateDeploymentResponse:
        caller = require_admin(context)
        asked = request.deployment
        model, version = parse_version_name(asked.model_version, field="deployment.model_version")
        name = parse_name(asked.name, "deployments", field="deployment.name")
        pool = check_pool(asked.pool)
        found = await self._store.find_version(model, version)
        if found is None:
            raise FailedPrecondition(
                f"{asked.model_version} does not exist",
                reason="RESOURCE_NOT_FOUND",
                metadata={"resource": asked.model_version},
                resource=asked.model_version,
            )
        deployment = Deployment(name, found, pool, self._clock.now())
        await self._store.insert_deployment(deployment)
        _changed("deployment created", caller, name=deployment.name, model_version=found.name)
        self._feed.changed()
        return pb.CreateDeploymentResponse(deployment=deployment_to_proto(deployment))

    @override
    async def GetDeployment(
        self, request: pb.GetDeploymentRequest, context: Context
    ) -> pb.GetDeploymentResponse:
        found = await self._store.get_deployment(parse_name(request.name, "deployments"))
        return pb.GetDeploymentResponse(deployment=deployment_to_proto(found))

    @override
    async def ListDeployments(
        self, request: pb.ListDeploymentsRequest, context: Context
    ) -> pb.ListDeploymentsResponse:
        page = await self._store.list_deployments(
            PageRequest.parse(request.page_size, request.page_token)
        )
        return pb.ListDeploymentsResponse(
            deployments=map(deployment_to_proto, page.rows), next_page_token=page.next_page_token
        )

    @override
    async def DeleteDeployment(
        self, request: pb.DeleteDeploymentRequest, context: Context
    ) -> pb.DeleteDeploymentResponse:
        caller = require_admin(context)
        await self._store.delete_deployment(parse_name(request.name, "deployments"))
        _changed("deployment deleted", caller, name=request.name)
        self._feed.changed()
        return pb.DeleteDeploymentResponse()

    @override
    async def WatchDeployments(
        self, request: pb.WatchDeploymentsRequest, context: Context
    ) -> AsyncIterator[pb.WatchDeploymentsResponse]:
        async for snapshot in self._feed.watch(request.pool):
            yield snapshot

    @override
    async def ReportBackend(
        self, request: pb.ReportBackendRequest, context: Context
    ) -> pb.ReportBackendResponse:
        require_admin_or_mesh(context)
        deployment = parse_name(request.deployment, "deployments", field="deployment")
        backend = check_backend(backend_from_proto(request.backend))
        if await self._store.put_backend(deployment, backend):
            _log.info(
                "backend reported",
                deployment=request.deployment,
                backend=backend.id,
                state=backend.state.value,
            )
            self._feed.changed()
        return pb.ReportBackendResponse()


def _changed(what: str, caller: Identity, **fields: object) -> None:
    """Logs who changed what: the record that outlives the record."""
    _log.info(what, tenant=caller.tenant, user=caller.user, **fields)
