"""Brings a model version into a mesh, through the API that anybody uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grpc
from google.protobuf.message import Message
from headrace.cost.v1 import cost_pb2, cost_pb2_grpc
from headrace.registry.v1 import registry_pb2, registry_pb2_grpc
from headrace.router.v1 import router_pb2, router_pb2_grpc

from deploy.errors import CliError
from deploy.local.edge_client import EdgeClient
from deploy.triton.artifact import BundledModel
from libs.model_reference import at_version, version_name

CHUNK_BYTES = 1024 * 1024
CALL_TIMEOUT_SECONDS = 20.0
UPLOAD_TIMEOUT_SECONDS = 120.0
READY_TIMEOUT_SECONDS = 180.0
ROUTE_PAUSE_SECONDS = 0.05

# The router has not heard of the deployment yet, or no backend has the version ready.
_NOT_YET = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE)


class Progress(Protocol):
    """Hears how a model comes up."""

    def step(self, model: str, text: str) -> None:
        """The model is being brought to this step."""

    def ready(self, name: str) -> None:
        """The model answers."""

    def note(self, text: str) -> None:
        """The user should know this."""


class Deployer:
    """The calls that bring one model up, each of which may be made again."""

    def __init__(self, edge: EdgeClient, progress: Progress) -> None:
        self._metadata = edge.metadata
        self._progress = progress
        self._registry = registry_pb2_grpc.RegistryServiceStub(edge.channel)
        self._router = router_pb2_grpc.RouterServiceStub(edge.channel)
        self._cost = cost_pb2_grpc.CostServiceStub(edge.channel)

    def bring(
        self,
        bundled: BundledModel,
        *,
        price: cost_pb2.Price,
        description: str = "",
        deployment: str = "",
    ) -> None:
        """Prices, registers and deploys a version; `await_ready` tells when it answers.

        Args:
            bundled: the version.
            price: of its model.
            description: of its model, for people.
            deployment: its id; empty: the model's name.
        """
        # First of all the price: no request must find the model without.
        self._create(self._cost.CreatePrice, cost_pb2.CreatePriceRequest(price=price))
        name = f"models/{bundled.model}"
        version = version_name(bundled.model, bundled.version)
        model = registry_pb2.Model(name=name, description=description)
        self._create(self._registry.CreateModel, registry_pb2.CreateModelRequest(model=model))
        self._register(version, bundled)
        wanted = registry_pb2.Deployment(
            name=f"deployments/{deployment or bundled.model}", model_version=version
        )
        self._create(
            self._registry.CreateDeployment,
            registry_pb2.CreateDeploymentRequest(deployment=wanted),
        )
        self._progress.step(bundled.model, "loading")

    def await_ready(self, bundled: BundledModel) -> None:
        """Returns when the router sends requests to the version."""
        name = at_version(bundled.model, bundled.version)
        deadline = time.monotonic() + READY_TIMEOUT_SECONDS
        while True:
            try:
                self._call(self._router.Route, router_pb2.RouteRequest(model=name))
            except grpc.RpcError as error:
                if error.code() not in _NOT_YET:
                    raise
                if time.monotonic() > deadline:
                    raise CliError(
                        f"{bundled.model} does not become ready: {self._why(bundled)}"
                    ) from error
            else:
                self._progress.ready(bundled.model)
                return
            time.sleep(ROUTE_PAUSE_SECONDS)

    def _register(self, version: str, bundled: BundledModel) -> None:
        known_digest = self._digest_of(version)
        if not known_digest:
            self._progress.step(bundled.model, "uploading")
            self._upload(bundled)
            wanted = registry_pb2.ModelVersion(name=version, artifact_digest=bundled.digest)
            self._create(
                self._registry.CreateModelVersion,
                registry_pb2.CreateModelVersionRequest(model_version=wanted),
            )
        elif known_digest != bundled.digest:
            self._progress.note(
                f"{version} is registered with another artifact than this checkout makes, and a "
                "version never changes; `make clean` forgets it"
            )

    def _upload(self, bundled: BundledModel) -> None:
        self._registry.UploadArtifact(
            _parts(bundled), metadata=self._metadata, timeout=UPLOAD_TIMEOUT_SECONDS
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

    def _why(self, bundled: BundledModel) -> str:
        answer = self._call(
            self._registry.GetDeployment,
            registry_pb2.GetDeploymentRequest(name=f"deployments/{bundled.model}"),
        )
        messages = [f"{backend.id}: {backend.message}" for backend in answer.deployment.backends]
        return "; ".join(messages) or "no pool agent has taken it up"

    def _create(self, method: Callable[..., Any], request: Message) -> None:
        try:
            self._call(method, request)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.ALREADY_EXISTS:
                raise

    def _call(self, method: Callable[..., Any], request: Message) -> Any:
        return method(request, metadata=self._metadata, timeout=CALL_TIMEOUT_SECONDS)


def _parts(bundled: BundledModel) -> Iterator[registry_pb2.UploadArtifactRequest]:
    size_bytes = bundled.artifact.stat().st_size
    metadata = registry_pb2.ArtifactMetadata(digest=bundled.digest, size_bytes=size_bytes)
    yield registry_pb2.UploadArtifactRequest(metadata=metadata)
    with bundled.artifact.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield registry_pb2.UploadArtifactRequest(chunk=chunk)
