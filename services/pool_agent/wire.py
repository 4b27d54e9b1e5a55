"""Protos to what the domain knows, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headrace.common.v1 import model_pb2
from headrace.registry.v1 import registry_pb2

from libs.model_reference import parse_version_name
from services.pool_agent.domain import Kind, Report, State, Wanted

_KINDS = {
    model_pb2.MODEL_KIND_CHAT: Kind.CHAT,
    model_pb2.MODEL_KIND_EMBEDDING: Kind.EMBEDDING,
}
_STATES = {
    State.LOADING: model_pb2.BACKEND_STATE_LOADING,
    State.READY: model_pb2.BACKEND_STATE_READY,
    State.FAILED: model_pb2.BACKEND_STATE_FAILED,
}
_STATES_FROM_PROTO = {proto: state for state, proto in _STATES.items()}


def wanted_from_proto(deployments: Sequence[registry_pb2.Deployment]) -> Mapping[str, Wanted]:
    """Returns what each deployment asks this Triton for, by the deployment's name.

    Models of external providers run elsewhere; kinds that are not known here are for newer agents.
    """
    return {
        deployment.name: _wanted(deployment)
        for deployment in deployments
        if not deployment.HasField("provider") and deployment.schema.kind in _KINDS
    }


def reports_from_proto(
    deployments: Sequence[registry_pb2.Deployment], backend_id: str
) -> Mapping[str, Report]:
    """Returns what the registry has heard from this backend, by the deployment's name."""
    return {
        deployment.name: Report(
            backend.backend_model,
            _STATES_FROM_PROTO.get(backend.state, State.FAILED),
            backend.artifact_digest,
            backend.message,
        )
        for deployment in deployments
        for backend in deployment.backends
        if backend.id == backend_id
    }


def report_to_proto(report: Report, *, backend_id: str, address: str) -> model_pb2.Backend:
    """Returns a report as it travels."""
    return model_pb2.Backend(
        id=backend_id,
        address=address,
        backend_model=report.backend_model,
        state=_STATES[report.state],
        artifact_digest=report.artifact_digest,
        message=report.message,
        kind=model_pb2.BACKEND_KIND_TRITON,
    )


def _wanted(deployment: registry_pb2.Deployment) -> Wanted:
    model, version = parse_version_name(deployment.model_version, field="model_version")
    return Wanted(model, str(version), deployment.artifact_digest, _KINDS[deployment.schema.kind])
