"""Protos to what the domain knows, and back."""

from __future__ import annotations

from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp
from headrace.common.v1 import model_pb2
from headrace.registry.v1 import registry_pb2

from libs.errors import InvalidArgument
from services.registry.domain import (
    Backend,
    BackendKind,
    Deployment,
    Kind,
    Lineage,
    Model,
    ModelVersion,
    Provider,
    Schema,
    Snapshot,
    State,
)

_KINDS = {
    Kind.CHAT: model_pb2.MODEL_KIND_CHAT,
    Kind.EMBEDDING: model_pb2.MODEL_KIND_EMBEDDING,
}
_BACKEND_KINDS = {
    BackendKind.TRITON: model_pb2.BACKEND_KIND_TRITON,
    BackendKind.OPENAI: model_pb2.BACKEND_KIND_OPENAI,
}
_BACKEND_KINDS_FROM_PROTO = {proto: kind for kind, proto in _BACKEND_KINDS.items()}
_STATES = {
    State.LOADING: model_pb2.BACKEND_STATE_LOADING,
    State.READY: model_pb2.BACKEND_STATE_READY,
    State.FAILED: model_pb2.BACKEND_STATE_FAILED,
}
_STATES_FROM_PROTO = {proto: state for state, proto in _STATES.items()}


def model_to_proto(model: Model) -> registry_pb2.Model:
    """Returns a model as it travels."""
    return registry_pb2.Model(
        name=model.name,
        description=model.description,
        create_time=_timestamp(model.create_time),
    )


def schema_to_proto(schema: Schema) -> model_pb2.ModelSchema:
    """Returns a schema as it travels."""
    return model_pb2.ModelSchema(
        kind=_KINDS[schema.kind],
        context_tokens=schema.context_tokens,
        max_output_tokens=schema.max_output_tokens,
        dimensions=schema.dimensions,
        max_input_tokens=schema.max_input_tokens,
        max_concurrent_requests=schema.max_concurrent_requests,
    )


def lineage_to_proto(lineage: Lineage) -> registry_pb2.Lineage:
    """Returns a lineage as it travels."""
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


def provider_to_proto(provider: Provider | None) -> model_pb2.Provider | None:
    """Returns a provider as it travels; None, which leaves a field unset, where there is none."""
    if provider is None:
        return None
    return model_pb2.Provider(
        base_url=provider.base_url, model=provider.model, api_key_name=provider.api_key_name
    )


def version_to_proto(version: ModelVersion) -> registry_pb2.ModelVersion:
    """Returns a version as it travels."""
    return registry_pb2.ModelVersion(
        name=version.name,
        artifact_digest=version.artifact_digest,
        artifact_file_name=version.artifact_file_name,
        schema=schema_to_proto(version.schema),
        lineage=lineage_to_proto(version.lineage),
        create_time=_timestamp(version.create_time),
        provider=provider_to_proto(version.provider),
    )


def backend_to_proto(backend: Backend) -> model_pb2.Backend:
    """Returns a backend as it travels."""
    return model_pb2.Backend(
        id=backend.id,
        address=backend.address,
        backend_model=backend.backend_model,
        state=_STATES[backend.state],
        artifact_digest=backend.artifact_digest,
        message=backend.message,
        kind=_BACKEND_KINDS[backend.kind],
        api_key_name=backend.api_key_name,
    )


def backend_from_proto(proto: model_pb2.Backend) -> Backend:
    """Reads a backend.

    Raises:
        InvalidArgument: its state is none.
    """
    state = _STATES_FROM_PROTO.get(proto.state)
    if state is None:
        raise InvalidArgument.of_field("backend.state", "must be LOADING, READY or FAILED")
    return Backend(
        id=proto.id,
        address=proto.address,
        backend_model=proto.backend_model,
        state=state,
        artifact_digest=proto.artifact_digest,
        message=proto.message,
        kind=_BACKEND_KINDS_FROM_PROTO.get(proto.kind, BackendKind.TRITON),
    )


def deployment_to_proto(deployment: Deployment) -> registry_pb2.Deployment:
    """Returns a deployment as it travels, with its version's artifact and schema."""
    version = deployment.model_version
    return registry_pb2.Deployment(
        name=deployment.name,
        model_version=version.name,
        pool=deployment.pool,
        artifact_digest=version.artifact_digest,
        schema=schema_to_proto(version.schema),
        backends=map(backend_to_proto, deployment.backends),
        create_time=_timestamp(deployment.create_time),
        provider=provider_to_proto(version.provider),
    )


def snapshot_to_proto(snapshot: Snapshot, pool: str) -> registry_pb2.WatchDeploymentsResponse:
    """Returns what a watcher of a pool is sent; of all pools where it is empty."""
    return registry_pb2.WatchDeploymentsResponse(
        revision=snapshot.revision,
        deployments=map(deployment_to_proto, snapshot.of_pool(pool)),
    )


def _timestamp(time: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp
