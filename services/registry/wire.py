"""Converts records to protos and back."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from headrace.common.v1 import backend_pb2, model_pb2
from headrace.registry.v1 import registry_internal_pb2, registry_pb2

from libs.errors import InvalidArgument
from libs.model_reference import parse_version_name
from libs.timestamps import to_timestamp
from services.registry.domain import (
    Backend,
    Deployment,
    DeploymentState,
    Kind,
    Lineage,
    Model,
    ModelVersion,
    ProviderTarget,
    Schema,
    Snapshot,
    SpecChange,
    State,
    Target,
    TritonBackend,
    TritonTarget,
)
from services.registry.rules import check_pool

_KINDS = {
    Kind.CHAT: model_pb2.MODEL_KIND_CHAT,
    Kind.EMBEDDING: model_pb2.MODEL_KIND_EMBEDDING,
}
_STATES = {
    State.LOADING: model_pb2.BACKEND_STATE_LOADING,
    State.READY: model_pb2.BACKEND_STATE_READY,
    State.FAILED: model_pb2.BACKEND_STATE_FAILED,
}
_STATES_FROM_PROTO = {proto: state for state, proto in _STATES.items()}
_DEPLOYMENT_STATES = {
    DeploymentState.PENDING: registry_pb2.DEPLOYMENT_STATE_PENDING,
    DeploymentState.READY: registry_pb2.DEPLOYMENT_STATE_READY,
    DeploymentState.FAILED: registry_pb2.DEPLOYMENT_STATE_FAILED,
}
_SPEC_PATHS = {
    "*": {"model_version", "pool"},
    "spec": {"model_version", "pool"},
    "spec.model_version": {"model_version"},
    "spec.pool": {"pool"},
}


def model_to_proto(model: Model) -> registry_pb2.Model:
    """Converts a model."""
    return registry_pb2.Model(
        name=model.name,
        description=model.description,
        create_time=to_timestamp(model.create_time),
    )


def schema_to_proto(schema: Schema) -> model_pb2.ModelSchema:
    """Converts a schema."""
    return model_pb2.ModelSchema(
        kind=_KINDS[schema.kind],
        context_tokens=schema.context_tokens,
        max_output_tokens=schema.max_output_tokens,
        dimensions=schema.dimensions,
        max_input_tokens=schema.max_input_tokens,
        max_concurrent_requests=schema.max_concurrent_requests,
    )


def lineage_to_proto(lineage: Lineage) -> registry_pb2.Lineage:
    """Converts a lineage."""
    return registry_pb2.Lineage(
        training_run=lineage.training_run,
        dataset=lineage.dataset,
        source_revision=lineage.source_revision,
    )


def lineage_from_proto(proto: registry_pb2.Lineage) -> Lineage:
    """Reads a lineage."""
    return Lineage(
        training_run=proto.training_run,
        dataset=proto.dataset,
        source_revision=proto.source_revision,
    )


def provider_to_proto(provider: ProviderTarget | None) -> backend_pb2.ProviderTarget | None:
    """Converts a provider; None, which leaves a field unset, stays None."""
    if provider is None:
        return None
    return backend_pb2.ProviderTarget(
        base_url=provider.base_url, model=provider.model, api_key_name=provider.api_key_name
    )


def version_to_proto(version: ModelVersion, *, full: bool) -> registry_pb2.ModelVersion:
    """Converts a version; only the full view has the provider."""
    return registry_pb2.ModelVersion(
        name=version.name,
        artifact_digest=version.artifact_digest,
        artifact_file_name=version.artifact_file_name,
        schema=schema_to_proto(version.schema),
        lineage=lineage_to_proto(version.lineage),
        create_time=to_timestamp(version.create_time),
        provider=provider_to_proto(version.provider) if full else None,
    )


def status_to_proto(backend: Backend[Target]) -> model_pb2.BackendStatus:
    """Converts the public part of a backend."""
    return model_pb2.BackendStatus(
        id=backend.id,
        state=_STATES[backend.state],
        artifact_digest=backend.artifact_digest,
        message=backend.message,
        update_time=to_timestamp(backend.update_time) if backend.update_time else None,
    )


def backend_to_proto(backend: Backend[Target]) -> backend_pb2.Backend:
    """Converts a backend with what is needed to call it."""
    status = status_to_proto(backend)
    if isinstance(backend.target, ProviderTarget):
        return backend_pb2.Backend(status=status, provider=provider_to_proto(backend.target))
    triton = backend_pb2.TritonTarget(address=backend.target.address, model=backend.target.model)
    return backend_pb2.Backend(status=status, triton=triton)


def report_from_proto(proto: backend_pb2.Backend, *, now: datetime) -> TritonBackend:
    """Reads the report of a backend.

    Raises:
        InvalidArgument: the state is unknown, or the target is not a Triton server.
    """
    state = _STATES_FROM_PROTO.get(proto.status.state)
    if state is None:
        raise InvalidArgument.of_field("backend.status.state", "must be LOADING, READY or FAILED")
    if proto.WhichOneof("target") != "triton":
        raise InvalidArgument.of_field(
            "backend.triton", "must be set: providers are part of artifacts and report nothing"
        )
    return Backend(
        id=proto.status.id,
        state=state,
        target=TritonTarget(proto.triton.address, proto.triton.model),
        artifact_digest=proto.status.artifact_digest,
        message=proto.status.message,
        update_time=now,
    )


def deployment_to_proto(deployment: Deployment) -> registry_pb2.Deployment:
    """Converts a deployment for users: without addresses and keys."""
    version = deployment.model_version
    return registry_pb2.Deployment(
        name=deployment.name,
        spec=registry_pb2.DeploymentSpec(model_version=version.name, pool=deployment.pool),
        status=registry_pb2.DeploymentStatus(
            state=_DEPLOYMENT_STATES[deployment.state],
            artifact_digest=version.artifact_digest,
            schema=schema_to_proto(version.schema),
            backends=map(status_to_proto, deployment.backends),
        ),
        etag=deployment.etag,
        create_time=to_timestamp(deployment.create_time),
        update_time=to_timestamp(deployment.update_time),
    )


def entry_to_proto(deployment: Deployment) -> registry_internal_pb2.DeploymentEntry:
    """Converts a deployment for services of the mesh: with what is needed to load and call it."""
    version = deployment.model_version
    return registry_internal_pb2.DeploymentEntry(
        name=deployment.name,
        model_version=version.name,
        pool=deployment.pool,
        artifact_digest=version.artifact_digest,
        schema=schema_to_proto(version.schema),
        create_time=to_timestamp(deployment.create_time),
        provider=provider_to_proto(version.provider),
        backends=map(backend_to_proto, deployment.backends),
    )


def spec_change_from_proto(spec: registry_pb2.DeploymentSpec, paths: Iterable[str]) -> SpecChange:
    """Reads what an update changes.

    Raises:
        InvalidArgument: the mask has other paths than those of a spec, or a field is invalid.
    """
    fields: set[str] = set()
    for path in set(paths):
        if path not in _SPEC_PATHS:
            raise InvalidArgument.of_field(
                "update_mask", "may have spec, spec.model_version and spec.pool only"
            )
        fields |= _SPEC_PATHS[path]
    fields = fields or _SPEC_PATHS["spec"]
    version = pool = None
    if "model_version" in fields:
        version = parse_version_name(spec.model_version, field="deployment.spec.model_version")
    if "pool" in fields:
        pool = check_pool(spec.pool)
    return SpecChange(version, pool)


def snapshot_to_proto(
    snapshot: Snapshot, pool: str
) -> registry_internal_pb2.WatchDeploymentsResponse:
    """Converts the deployments of a pool; of all pools if it is empty."""
    return registry_internal_pb2.WatchDeploymentsResponse(
        revision=snapshot.revision,
        deployments=map(entry_to_proto, snapshot.of_pool(pool)),
    )
