"""From deployments to routes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import semver
from headrace.common.v1 import model_pb2
from headrace.registry.v1 import registry_pb2
from headrace.router.v1 import router_pb2

from libs.model_reference import version_of


def routes_of(deployments: Iterable[registry_pb2.Deployment]) -> list[router_pb2.ModelRoute]:
    """Returns the route of each model that has a deployment, by name.

    The targets of a model are in the order in which they are chosen: ready ones first, then the
    highest version by semantic precedence, then the deployment that was created last.
    """
    by_model: dict[str, list[registry_pb2.Deployment]] = {}
    for deployment in deployments:
        by_model.setdefault(deployment.model_version.split("/")[1], []).append(deployment)
    return [
        router_pb2.ModelRoute(
            model=model,
            targets=[
                router_pb2.RouteTarget(
                    deployment=deployment.name,
                    model_version=deployment.model_version,
                    artifact_digest=deployment.artifact_digest,
                    schema=deployment.schema,
                    backends=ready_backends(deployment),
                )
                for deployment in sorted(by_model[model], key=_precedence, reverse=True)
            ],
        )
        for model in sorted(by_model)
    ]


def ready_backends(deployment: registry_pb2.Deployment) -> Sequence[model_pb2.Backend]:
    """Returns the backends that serve exactly the artifact of the deployment."""
    return [
        backend
        for backend in deployment.backends
        if backend.state == model_pb2.BACKEND_STATE_READY
        and backend.artifact_digest == deployment.artifact_digest
    ]


def _precedence(
    deployment: registry_pb2.Deployment,
) -> tuple[bool, semver.Version, int, str]:
    version = semver.Version.parse(version_of(deployment.model_version))
    created = deployment.create_time.ToNanoseconds()
    return bool(ready_backends(deployment)), version, created, deployment.name
