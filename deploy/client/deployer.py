"""Registers, prices and deploys a model version through the public API."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grpc
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from headrace.cost.v1 import cost_pb2, cost_pb2_grpc
from headrace.registry.v1 import registry_pb2, registry_pb2_grpc
from headrace.router.v1 import router_pb2, router_pb2_grpc

from deploy.client.edge import EdgeClient
from deploy.errors import CliError
from deploy.triton.artifact import BundledModel
from libs.model_reference import at_version, version_name, version_of

CHUNK_BYTES = 1024 * 1024
CALL_TIMEOUT_SECONDS = 20.0
UPLOAD_TIMEOUT_SECONDS = 120.0
READY_TIMEOUT_SECONDS = 180.0
# Loading is tried again, and a failure of an earlier start may still be reported.
FAILED_SECONDS = 10.0
ROUTE_PAUSE_SECONDS = 0.05
CHECK_PAUSE_SECONDS = 1.0
# What the calls need: a price, a version with its deployment, and whether the version is ready.
DEPLOY_SCOPES = "billing registry read"

# The router does not know the deployment yet, or no backend has the version ready.
_NOT_YET = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE)


class DeployProgress(Protocol):
    """Callbacks for the progress of a deployment."""

    def step(self, model: str, text: str) -> None:
        """Called when a step starts, such as `uploading`."""

    def ready(self, name: str) -> None:
        """Called when the model answers."""

    def note(self, text: str) -> None:
        """Called with what the user should know."""


class Deployer:
    """Makes the calls that deploy a model version. Every method may be called again.

    The client's token must have `DEPLOY_SCOPES`.
    """

    def __init__(self, edge: EdgeClient, progress: DeployProgress) -> None:
        self._metadata = edge.metadata
        self._progress = progress
        self._registry = registry_pb2_grpc.RegistryServiceStub(edge.channel)
        self._router = router_pb2_grpc.RouterServiceStub(edge.channel)
        self._cost = cost_pb2_grpc.CostServiceStub(edge.channel)
        self._served: dict[str, str] = {}  # by model, where it is not the bundled version
        self._deployments: dict[str, str] = {}  # by model, where it is not the model's name

    def deploy(
        self,
        bundled: BundledModel,
        *,
        price: cost_pb2.Price,
        description: str = "",
        deployment: str = "",
    ) -> None:
        """Prices, registers and deploys a version. `wait_until_ready` waits until it answers.

        A deployment that exists is updated from a version that this one replaces; one that serves
        any other version is left unchanged.

        Args:
            bundled: the version.
            price: of its model.
            description: of its model, for people.
            deployment: the deployment's id; the model's name if empty.
        """
        # The price comes first: no request may reach a model without a price.
        self._create(self._cost.CreatePrice, cost_pb2.CreatePriceRequest(price=price))
        name = f"models/{bundled.model}"
        version = version_name(bundled.model, bundled.version)
        model = registry_pb2.Model(name=name, description=description)
        self._create(self._registry.CreateModel, registry_pb2.CreateModelRequest(model=model))
        self._register(version, bundled)
        new = registry_pb2.Deployment(
            name=f"deployments/{deployment or bundled.model}",
            spec=registry_pb2.DeploymentSpec(model_version=version),
        )
        self._deployments[bundled.model] = new.name
        request = registry_pb2.CreateDeploymentRequest(deployment=new)
        if not self._create(self._registry.CreateDeployment, request):
            self._upgrade(new, bundled)
        self._progress.step(bundled.model, "loading")

    def wait_until_ready(self, bundled: BundledModel) -> None:
        """Returns when the router sends requests to the version that the deployment serves.

        Raises:
            CliError: all backends have failed to load it for `FAILED_SECONDS`, or it takes longer
                than `READY_TIMEOUT_SECONDS`; the message says why.
            grpc.RpcError: a call failed.
        """
        name = at_version(bundled.model, self._served.get(bundled.model, bundled.version))
        deadline = time.monotonic() + READY_TIMEOUT_SECONDS
        last_good = next_check = time.monotonic()
        while not self._is_routed(name):
            now = time.monotonic()
            if now >= next_check:
                next_check = now + CHECK_PAUSE_SECONDS
                found = self._deployment(bundled)
                if found.status.state != registry_pb2.DEPLOYMENT_STATE_FAILED:
                    last_good = now
                if now > deadline or now > last_good + FAILED_SECONDS:
                    raise CliError(f"{bundled.model} is not ready: {_backend_messages(found)}")
            time.sleep(ROUTE_PAUSE_SECONDS)
        self._progress.ready(bundled.model)

    def _is_routed(self, model: str) -> bool:
        """Returns whether the router sends requests to a version.

        Raises:
            grpc.RpcError: the call failed for another reason than that it does not do so yet.
        """
        try:
            self._call(self._router.Route, router_pb2.RouteRequest(model=model))
        except grpc.RpcError as error:
            if error.code() in _NOT_YET:
                return False
            raise
        return True

    def _upgrade(self, new: registry_pb2.Deployment, bundled: BundledModel) -> None:
        """Changes the version of a deployment that exists, if the new one replaces it."""
        found = self._call(
            self._registry.GetDeployment, registry_pb2.GetDeploymentRequest(name=new.name)
        ).deployment
        if found.spec.model_version == new.spec.model_version:
            return
        served = version_of(found.spec.model_version)
        model = found.spec.model_version.removesuffix(f"/versions/{served}")
        if model != f"models/{bundled.model}" or served not in bundled.replaces:
            self._progress.note(
                f"{new.name} serves {found.spec.model_version}, which is left unchanged; "
                f"{bundled.version} is registered"
            )
            self._served[bundled.model] = served
            return
        new.etag = found.etag
        self._call(
            self._registry.UpdateDeployment,
            registry_pb2.UpdateDeploymentRequest(
                deployment=new, update_mask=FieldMask(paths=["spec.model_version"])
            ),
        )
        self._progress.note(f"{new.name}: {served} is replaced by {bundled.version}")

    def _register(self, version: str, bundled: BundledModel) -> None:
        known_digest = self._digest_of(version)
        if not known_digest:
            self._progress.step(bundled.model, "uploading")
            self._upload(bundled)
            new = registry_pb2.ModelVersion(name=version, artifact_digest=bundled.digest)
            self._create(
                self._registry.CreateModelVersion,
                registry_pb2.CreateModelVersionRequest(model_version=new),
            )
        elif known_digest != bundled.digest:
            self._progress.note(
                f"{version} is registered with another artifact than this repository has, and a "
                "version never changes; run `make clean` to start without it"
            )

    def _upload(self, bundled: BundledModel) -> None:
        self._registry.UploadArtifact(
            _upload_requests(bundled), metadata=self._metadata, timeout=UPLOAD_TIMEOUT_SECONDS
        )

    def _digest_of(self, version: str) -> str:
        try:
            answer = self._call(
                self._registry.GetModelVersion, registry_pb2.GetModelVersionRequest(name=version)
            )
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.NOT_FOUND:
                return ""
            raise
        return str(answer.model_version.artifact_digest)

    def _deployment(self, bundled: BundledModel) -> registry_pb2.Deployment:
        name = self._deployments.get(bundled.model, f"deployments/{bundled.model}")
        request = registry_pb2.GetDeploymentRequest(name=name)
        found: registry_pb2.Deployment = self._call(
            self._registry.GetDeployment, request
        ).deployment
        return found

    def _create(self, method: Callable[..., Any], request: Message) -> bool:
        """Returns whether it was created; False: it exists with other content."""
        try:
            self._call(method, request)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.ALREADY_EXISTS:
                raise
            return False
        return True

    def _call(self, method: Callable[..., Any], request: Message) -> Any:
        return method(request, metadata=self._metadata, timeout=CALL_TIMEOUT_SECONDS)


def _backend_messages(deployment: registry_pb2.Deployment) -> str:
    messages = [f"{backend.id}: {backend.message}" for backend in deployment.status.backends]
    return "; ".join(messages) or "no pool agent has reported on it; see `headrace logs pool_agent`"


def _upload_requests(bundled: BundledModel) -> Iterator[registry_pb2.UploadArtifactRequest]:
    size_bytes = bundled.artifact.stat().st_size
    metadata = registry_pb2.ArtifactMetadata(digest=bundled.digest, size_bytes=size_bytes)
    yield registry_pb2.UploadArtifactRequest(metadata=metadata)
    with bundled.artifact.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield registry_pb2.UploadArtifactRequest(chunk=chunk)
