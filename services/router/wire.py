"""Converts the registry's deployments to routes."""

from __future__ import annotations

from collections.abc import Iterable

import structlog
from headrace.common.v1 import backend_pb2, model_pb2
from headrace.registry.v1.registry_internal_pb2 import DeploymentEntry
from headrace.router.v1.router_internal_pb2 import ModelRoute, RouteTarget

from libs.errors import InvalidArgument
from libs.model_reference import parse_version_name
from services.router.domain import Candidate, candidates_by_model
from services.router.metrics import SKIPPED

_log = structlog.get_logger()


def routes_from_proto(entries: Iterable[DeploymentEntry]) -> list[ModelRoute]:
    """Returns the route of each model that has a deployment, by name.

    A deployment that cannot be read is skipped: the routes of the others must not depend on it.
    """
    readable: dict[str, tuple[Candidate, DeploymentEntry]] = {}
    for entry in entries:
        try:
            readable[entry.name] = _candidate(entry), entry
        except (InvalidArgument, ValueError) as error:  # ValueError: a time out of range
            SKIPPED.inc()
            _log.error("deployment skipped", deployment=entry.name, error=str(error))
    ranked_by_model = candidates_by_model(candidate for candidate, _ in readable.values())
    return [
        ModelRoute(model=model, targets=[_target(readable[one.deployment][1]) for one in ranked])
        for model, ranked in ranked_by_model.items()
    ]


def without_report_times(routes: Iterable[ModelRoute]) -> list[ModelRoute]:
    """Returns copies to compare: a backend that repeats its report does not change a route."""
    copies = [ModelRoute.FromString(route.SerializeToString()) for route in routes]
    for route in copies:
        for target in route.targets:
            for backend in target.backends:
                backend.status.ClearField("update_time")
    return copies


def ready_backends(entry: DeploymentEntry) -> list[backend_pb2.Backend]:
    """Returns the backends that serve exactly the artifact of the deployment's version."""
    return [
        backend
        for backend in entry.backends
        if backend.status.state == model_pb2.BACKEND_STATE_READY
        and backend.status.artifact_digest == entry.artifact_digest
    ]


def _candidate(entry: DeploymentEntry) -> Candidate:
    model, version = parse_version_name(entry.model_version, field="model_version")
    return Candidate(
        deployment=entry.name,
        model=model,
        version=version,
        ready=bool(ready_backends(entry)),
        create_nanos=entry.create_time.ToNanoseconds(),
    )


def _target(entry: DeploymentEntry) -> RouteTarget:
    return RouteTarget(
        deployment=entry.name,
        model_version=entry.model_version,
        artifact_digest=entry.artifact_digest,
        schema=entry.schema,
        backends=ready_backends(entry),
    )
