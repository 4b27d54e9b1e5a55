"""Converts deployments to what is wanted here, and reports to protos and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import structlog
from headrace.common.v1 import backend_pb2, model_pb2
from headrace.registry.v1.registry_internal_pb2 import DeploymentEntry

from libs.errors import InvalidArgument
from libs.model_reference import parse_version_name
from services.pool_agent.domain import Kind, Report, State, Wanted

_log = structlog.get_logger()

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


def wanted_from_proto(entries: Iterable[DeploymentEntry]) -> Mapping[str, Wanted]:
    """Returns what each deployment wants of this Triton server, by the deployment's name.

    Deployments at providers run elsewhere. Kinds that are not known here are for newer agents. A
    deployment that cannot be read is skipped: the others must not depend on it.
    """
    found: dict[str, Wanted] = {}
    for entry in entries:
        if entry.HasField("provider") or entry.schema.kind not in _KINDS:
            continue
        try:
            found[entry.name] = _wanted(entry)
        except InvalidArgument as error:
            _log.error("deployment skipped", deployment=entry.name, error=error.message)
    return found


def reports_from_proto(entries: Iterable[DeploymentEntry], backend_id: str) -> Mapping[str, Report]:
    """Returns what the registry has received from this backend, by the deployment's name."""
    return {
        entry.name: Report(
            backend.triton.model,
            _STATES_FROM_PROTO.get(backend.status.state, State.FAILED),
            backend.status.artifact_digest,
            backend.status.message,
        )
        for entry in entries
        for backend in entry.backends
        if backend.status.id == backend_id and backend.HasField("triton")
    }


def report_to_proto(report: Report, *, backend_id: str, address: str) -> backend_pb2.Backend:
    """Converts a report."""
    return backend_pb2.Backend(
        status=model_pb2.BackendStatus(
            id=backend_id,
            state=_STATES[report.state],
            artifact_digest=report.artifact_digest,
            message=report.message,
        ),
        triton=backend_pb2.TritonTarget(address=address, model=report.backend_model),
    )


def _wanted(entry: DeploymentEntry) -> Wanted:
    model, version = parse_version_name(entry.model_version, field="model_version")
    return Wanted(model, str(version), entry.artifact_digest, _KINDS[entry.schema.kind])
