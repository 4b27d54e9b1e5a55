"""`RegistryService`: each RPC reads its request, asks rules and store, and answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import structlog
from headrace.registry.v1 import registry_pb2 as pb
from headrace.registry.v1 import registry_pb2_grpc
from typing_extensions import override

from libs.clock import Clock
from libs.errors import NotFound
from libs.model_reference import parse_version_name
from libs.rpc.access import REGISTRY
from libs.rpc.identity import Context, Identity, identity_of
from libs.rpc.names import parse_name
from libs.rpc.paging import PageRequest
from services.registry.artifacts import ArtifactStore
from services.registry.domain import Deployment, ModelVersion
from services.registry.feed import DeploymentFeed
from services.registry.filters import deployment_conditions, model_conditions, version_conditions
from services.registry.manifest import manifest_of_artifact
from services.registry.metrics import ARTIFACT_BYTES
from services.registry.provider_hosts import ProviderHosts
from services.registry.rules import (
    check_digest,
    check_lineage,
    check_pool,
    missing_version,
    new_model,
)
from services.registry.store import RegistryStore
from services.registry.upload import Upload, UploadLimits, UploadSlots
from services.registry.wire import (
    deployment_to_proto,
    lineage_from_proto,
    model_to_proto,
    spec_change_from_proto,
    version_to_proto,
)

_log = structlog.get_logger()


class RegistryServicer(registry_pb2_grpc.RegistryServiceServicer):
    """Models, versions, artifacts and deployments, for users and operators."""

    def __init__(
        self,
        *,
        store: RegistryStore,
        artifacts: ArtifactStore,
        feed: DeploymentFeed,
        limits: UploadLimits,
        provider_hosts: ProviderHosts,
        clock: Clock,
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._feed = feed
        self._limits = limits
        self._provider_hosts = provider_hosts
        self._slots = UploadSlots(limits.concurrent)
        self._clock = clock

    @override
    async def CreateModel(
        self, request: pb.CreateModelRequest, context: Context
    ) -> pb.CreateModelResponse:
        caller = identity_of(context)
        model = new_model(
            name=request.model.name,
            description=request.model.description,
            now=self._clock.now(),
        )
        await self._store.insert_model(model)
        _log_change("model created", caller, name=model.name)
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
            PageRequest.parse(request.page_size, request.page_token),
            model_conditions(request.filter),
        )
        return pb.ListModelsResponse(
            models=map(model_to_proto, page.rows), next_page_token=page.next_page_token
        )

    @override
    async def UploadArtifact(
        self, request_iterator: AsyncIterator[pb.UploadArtifactRequest], context: Context
    ) -> pb.UploadArtifactResponse:
        caller = identity_of(context)
        with self._slots.slot():
            upload = Upload(aiter(request_iterator), limits=self._limits)
            metadata = await upload.metadata()
            await self._artifacts.put(
                metadata.digest, size_bytes=metadata.size_bytes, chunks=upload.chunks()
            )
        ARTIFACT_BYTES.inc(metadata.size_bytes)
        _log_change(
            "artifact stored", caller, digest=metadata.digest, size_bytes=metadata.size_bytes
        )
        return pb.UploadArtifactResponse(digest=metadata.digest, size_bytes=metadata.size_bytes)

    @override
    async def CreateModelVersion(
        self, request: pb.CreateModelVersionRequest, context: Context
    ) -> pb.CreateModelVersionResponse:
        caller = identity_of(context)
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
        _log_change("version created", caller, name=created.name, artifact_digest=digest)
        return pb.CreateModelVersionResponse(model_version=version_to_proto(created, full=True))

    @override
    async def GetModelVersion(
        self, request: pb.GetModelVersionRequest, context: Context
    ) -> pb.GetModelVersionResponse:
        full = _is_full(request.view, context)
        found = await self._store.find_version(*parse_version_name(request.name))
        if found is None:
            raise NotFound.of_resource(request.name)
        return pb.GetModelVersionResponse(model_version=version_to_proto(found, full=full))

    @override
    async def ListModelVersions(
        self, request: pb.ListModelVersionsRequest, context: Context
    ) -> pb.ListModelVersionsResponse:
        full = _is_full(request.view, context)
        page = await self._store.list_versions(
            parse_name(request.parent, "models", field="parent"),
            PageRequest.parse(request.page_size, request.page_token),
            version_conditions(request.filter),
        )
        return pb.ListModelVersionsResponse(
            model_versions=(version_to_proto(one, full=full) for one in page.rows),
            next_page_token=page.next_page_token,
        )

    @override
    async def CreateDeployment(
        self, request: pb.CreateDeploymentRequest, context: Context
    ) -> pb.CreateDeploymentResponse:
        caller = identity_of(context)
        name = parse_name(request.deployment.name, "deployments", field="deployment.name")
        spec = request.deployment.spec
        version = parse_version_name(spec.model_version, field="deployment.spec.model_version")
        pool = check_pool(spec.pool)
        found = await self._store.find_version(*version)
        if found is None:
            raise missing_version(spec.model_version)
        await self._provider_hosts.check(found)
        now = self._clock.now()
        deployment = await self._store.insert_deployment(
            Deployment(name, found, pool, create_time=now, update_time=now)
        )
        self._deployment_changed("deployment created", caller, deployment)
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
            PageRequest.parse(request.page_size, request.page_token),
            deployment_conditions(request.filter),
        )
        return pb.ListDeploymentsResponse(
            deployments=map(deployment_to_proto, page.rows), next_page_token=page.next_page_token
        )

    @override
    async def UpdateDeployment(
        self, request: pb.UpdateDeploymentRequest, context: Context
    ) -> pb.UpdateDeploymentResponse:
        caller = identity_of(context)
        wanted = request.deployment
        change = spec_change_from_proto(wanted.spec, request.update_mask.paths)
        if change.version is not None:
            version = await self._store.find_version(*change.version)
            if version is not None:  # else the update reports it after its other checks
                await self._provider_hosts.check(version)
        deployment, changed = await self._store.update_deployment(
            parse_name(wanted.name, "deployments", field="deployment.name"),
            change,
            etag=wanted.etag,
            now=self._clock.now(),
        )
        if changed:
            self._deployment_changed("deployment updated", caller, deployment)
        return pb.UpdateDeploymentResponse(deployment=deployment_to_proto(deployment))

    @override
    async def DeleteDeployment(
        self, request: pb.DeleteDeploymentRequest, context: Context
    ) -> pb.DeleteDeploymentResponse:
        caller = identity_of(context)
        await self._store.delete_deployment(
            parse_name(request.name, "deployments"), etag=request.etag
        )
        _log_change("deployment deleted", caller, name=request.name)
        self._feed.changed()
        return pb.DeleteDeploymentResponse()

    def _deployment_changed(self, what: str, caller: Identity, deployment: Deployment) -> None:
        _log_change(
            what,
            caller,
            name=deployment.name,
            model_version=deployment.model_version.name,
            pool=deployment.pool,
        )
        self._feed.changed()


def _is_full(view: pb.ModelVersionView.ValueType, context: Context) -> bool:
    if view != pb.MODEL_VERSION_VIEW_FULL:
        return False
    identity_of(context).require(REGISTRY)
    return True


def _log_change(what: str, caller: Identity, **fields: object) -> None:
    """Logs who changed what; the log entry outlives the record."""
    _log.info(what, tenant=caller.tenant, user=caller.user, **fields)
