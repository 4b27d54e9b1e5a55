"""Lists and changes what the registry of a mesh has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from headrace.common.v1 import model_pb2
from headrace.registry.v1 import registry_pb2, registry_pb2_grpc

from deploy.client.edge import EdgeClient, describe
from deploy.errors import CliError

CALL_TIMEOUT_SECONDS = 5.0
PAGE_SIZE = 1000


@dataclass(frozen=True, kw_only=True)
class BackendStatus:
    """A backend of a deployment; `state` is such as `ready` or `loading`."""

    id: str
    state: str
    message: str


@dataclass(frozen=True, kw_only=True)
class DeploymentStatus:
    """A deployment; `model_version` is such as `smollm2@1.0.0`, `state` such as `ready`."""

    name: str
    state: str
    model_version: str
    pool: str
    artifact_digest: str
    backends: Sequence[BackendStatus]
    etag: str
    update_time: str


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A model, with its versions, the highest first."""

    name: str
    description: str
    versions: Sequence[str]
    create_time: str


class Registry:
    """The calls of one client. Reading needs the scope `read`, changing `registry`.

    Raises:
        CliError: a call failed, from any method.
    """

    def __init__(self, edge: EdgeClient) -> None:
        self._metadata = edge.metadata
        self._stub = registry_pb2_grpc.RegistryServiceStub(edge.channel)

    def deployments(self, conditions: str = "") -> list[DeploymentStatus]:
        """Returns the deployments, or those that meet a filter, by name."""
        request = registry_pb2.ListDeploymentsRequest(page_size=PAGE_SIZE, filter=conditions)
        return [
            _deployment_status(deployment)
            for page in self._pages(self._stub.ListDeployments, request)
            for deployment in page.deployments
        ]

    def models(self, conditions: str = "") -> list[ModelInfo]:
        """Returns the models, or those that meet a filter, by name."""
        request = registry_pb2.ListModelsRequest(page_size=PAGE_SIZE, filter=conditions)
        return [
            ModelInfo(
                name=model.name.removeprefix("models/"),
                description=model.description,
                versions=self._versions(model.name),
                create_time=_time(model.create_time),
            )
            for page in self._pages(self._stub.ListModels, request)
            for model in page.models
        ]

    def update_deployment(
        self, name: str, *, version: str | None, pool: str | None, etag: str = ""
    ) -> DeploymentStatus:
        """Changes the version or the pool of a deployment, and returns it.

        Args:
            name: the id of the deployment.
            version: a semantic version of the same model; None leaves it as it is.
            pool: the name of a pool; None leaves it as it is.
            etag: the one that the deployment must have; empty: the one that it has now.
        """
        request = registry_pb2.GetDeploymentRequest(name=f"deployments/{name}")
        deployment = self._call(self._stub.GetDeployment, request).deployment
        paths = []
        if version is not None:
            model = deployment.spec.model_version.partition("/versions/")[0]
            deployment.spec.model_version = f"{model}/versions/{version}"
            paths.append("spec.model_version")
        if pool is not None:
            deployment.spec.pool = pool
            paths.append("spec.pool")
        deployment.etag = etag or deployment.etag
        answer = self._call(
            self._stub.UpdateDeployment,
            registry_pb2.UpdateDeploymentRequest(
                deployment=deployment, update_mask=FieldMask(paths=paths)
            ),
        )
        return _deployment_status(answer.deployment)

    def delete_deployment(self, name: str, *, etag: str = "") -> None:
        """Deletes a deployment; with an etag only if the deployment has it."""
        request = registry_pb2.DeleteDeploymentRequest(name=f"deployments/{name}", etag=etag)
        self._call(self._stub.DeleteDeployment, request)

    def _versions(self, model: str) -> list[str]:
        request = registry_pb2.ListModelVersionsRequest(parent=model, page_size=PAGE_SIZE)
        return [
            version.name.partition("/versions/")[2]
            for page in self._pages(self._stub.ListModelVersions, request)
            for version in page.model_versions
        ]

    def _pages(self, method: Callable[..., Any], request: Any) -> Iterator[Any]:
        while True:
            page = self._call(method, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return method(request, metadata=self._metadata, timeout=CALL_TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            raise CliError(describe(error)) from error


def _deployment_status(deployment: registry_pb2.Deployment) -> DeploymentStatus:
    spec, status = deployment.spec, deployment.status
    state = registry_pb2.DeploymentState.Name(status.state)
    return DeploymentStatus(
        name=deployment.name.removeprefix("deployments/"),
        state=state.removeprefix("DEPLOYMENT_STATE_").lower(),
        model_version=spec.model_version.removeprefix("models/").replace("/versions/", "@"),
        pool=spec.pool,
        artifact_digest=status.artifact_digest,
        backends=[
            BackendStatus(
                id=backend.id,
                state=model_pb2.BackendState.Name(backend.state)
                .removeprefix("BACKEND_STATE_")
                .lower(),
                message=backend.message,
            )
            for backend in status.backends
        ],
        etag=deployment.etag,
        update_time=_time(deployment.update_time),
    )


def _time(time: Timestamp) -> str:
    """Returns a time in RFC 3339, in whole seconds."""
    return Timestamp(seconds=time.seconds).ToJsonString()
