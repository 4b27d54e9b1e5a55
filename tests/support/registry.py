"""Artifacts to register, and a client of the registry."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import tarfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import field_mask_pb2
from headrace.common.v1 import backend_pb2, model_pb2
from headrace.registry.v1 import registry_internal_pb2 as internal_pb
from headrace.registry.v1 import registry_internal_pb2_grpc, registry_pb2_grpc
from headrace.registry.v1 import registry_pb2 as pb

from libs.clock import SystemClock
from libs.db import create_engine, migrate
from libs.http_client import AddressPolicy
from libs.rpc.channel import open_channel
from libs.rpc.identity import Identity, mesh_identity
from services.registry.artifacts import open_store
from services.registry.feed import DeploymentFeed
from services.registry.internal_servicer import RegistryInternalServicer
from services.registry.provider_hosts import ProviderHosts
from services.registry.servicer import RegistryServicer
from services.registry.store import RegistryStore
from services.registry.upload import UploadLimits
from tests.support.edge import serving

REGISTRAR = Identity("acme", "ann", frozenset({"registry"})).metadata()
USER = Identity("acme", "ann", frozenset({"infer", "read"})).metadata()
OPERATOR = Identity("acme", "ann", frozenset({"read", "registry"})).metadata()
SERVICE = mesh_identity("test").metadata()
CHAT = {"kind": "chat", "context_tokens": 1024, "max_output_tokens": 256}
EMBEDDING = {"kind": "embedding", "dimensions": 384, "max_input_tokens": 256}


def artifact(
    manifest: Mapping[str, Any] | bytes | None = CHAT,
    *,
    payload: bytes = b"w",
    manifest_name: str = "headrace.json",
) -> bytes:
    """Packs a tar with a `headrace.json`, unless it is None, and a file of weights."""
    files = {"1/weights": payload}
    if manifest is not None:
        text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
        files[manifest_name] = text
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


async def parts(
    content: bytes,
    *,
    digest: str | None = None,
    size_bytes: int | None = None,
    chunk_bytes: int = 1024 * 1024,
) -> AsyncIterator[pb.UploadArtifactRequest]:
    """Yields the messages of an upload; `digest` and `size_bytes` replace the right values."""
    yield pb.UploadArtifactRequest(
        metadata=pb.ArtifactMetadata(
            digest=digest_of(content) if digest is None else digest,
            size_bytes=len(content) if size_bytes is None else size_bytes,
        )
    )
    for start in range(0, len(content), chunk_bytes):
        yield pb.UploadArtifactRequest(chunk=content[start : start + chunk_bytes])


def backend(
    identifier: str = "triton-0",
    state: model_pb2.BackendState.ValueType = model_pb2.BACKEND_STATE_FAILED,
    *,
    digest: str = "",
    message: str = "",
    address: str = "127.0.0.1:1",
    model: str = "m",
) -> backend_pb2.Backend:
    """Makes the report of a Triton server."""
    return backend_pb2.Backend(
        status=model_pb2.BackendStatus(
            id=identifier, state=state, artifact_digest=digest, message=message
        ),
        triton=backend_pb2.TritonTarget(address=address, model=model),
    )


def ready_backend(digest: str, **fields: Any) -> backend_pb2.Backend:
    """Makes the report of a Triton server that has an artifact ready."""
    return backend(state=model_pb2.BACKEND_STATE_READY, digest=digest, **fields)


class _Stub:
    """A stub whose calls have metadata by default; none at all with `metadata=()`."""

    def __init__(self, stub: Any, metadata: Any) -> None:
        self._stub = stub
        self._metadata = metadata

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._stub, name)

        def call(request: Any, *, metadata: Any = self._metadata, **more: Any) -> Any:
            return method(request, metadata=metadata, **more)

        return call


class RegistryClient:
    """Calls a registry as an admin, or with other metadata.

    Attributes:
        address: of the server, if the test runs it.
        stub: calls as a user unless it is given other metadata.
        internal: calls as a service of the mesh unless it is given other metadata.
    """

    def __init__(self, channel: grpc.aio.Channel, address: str = "") -> None:
        self.address = address
        self.stub = _Stub(registry_pb2_grpc.RegistryServiceStub(channel), USER)
        self.internal = _Stub(
            registry_internal_pb2_grpc.RegistryInternalServiceStub(channel), SERVICE
        )

    async def upload(self, content: bytes, **metadata: Any) -> str:
        answer: pb.UploadArtifactResponse = await self.stub.UploadArtifact(
            parts(content, **metadata), metadata=REGISTRAR
        )
        return answer.digest

    async def download(self, digest: str, metadata: Any = SERVICE) -> bytes:
        call = self.internal.DownloadArtifact(
            internal_pb.DownloadArtifactRequest(digest=digest), metadata=metadata
        )
        return b"".join([message.chunk async for message in call])

    async def create_model(self, model: str, description: str = "") -> pb.Model:
        answer: pb.CreateModelResponse = await self.stub.CreateModel(
            pb.CreateModelRequest(model=pb.Model(name=f"models/{model}", description=description)),
            metadata=REGISTRAR,
        )
        return answer.model

    async def create_version(self, name: str, digest: str, **fields: Any) -> pb.ModelVersion:
        answer: pb.CreateModelVersionResponse = await self.stub.CreateModelVersion(
            pb.CreateModelVersionRequest(
                model_version=pb.ModelVersion(name=name, artifact_digest=digest, **fields)
            ),
            metadata=REGISTRAR,
        )
        return answer.model_version

    async def deploy(self, name: str, version: str, pool: str = "") -> pb.Deployment:
        answer: pb.CreateDeploymentResponse = await self.stub.CreateDeployment(
            pb.CreateDeploymentRequest(
                deployment=pb.Deployment(
                    name=name, spec=pb.DeploymentSpec(model_version=version, pool=pool)
                )
            ),
            metadata=REGISTRAR,
        )
        return answer.deployment

    async def get(self, name: str) -> pb.Deployment:
        answer: pb.GetDeploymentResponse = await self.stub.GetDeployment(
            pb.GetDeploymentRequest(name=name)
        )
        return answer.deployment

    async def update(
        self, name: str, *paths: str, version: str = "", pool: str = "", etag: str = ""
    ) -> pb.Deployment:
        deployment = pb.Deployment(
            name=name, spec=pb.DeploymentSpec(model_version=version, pool=pool), etag=etag
        )
        answer: pb.UpdateDeploymentResponse = await self.stub.UpdateDeployment(
            pb.UpdateDeploymentRequest(
                deployment=deployment, update_mask=field_mask_pb2.FieldMask(paths=paths)
            ),
            metadata=REGISTRAR,
        )
        return answer.deployment

    async def undeploy(self, name: str, etag: str = "") -> None:
        request = pb.DeleteDeploymentRequest(name=name, etag=etag)
        await self.stub.DeleteDeployment(request, metadata=REGISTRAR)

    async def report(self, deployment: str, backend: backend_pb2.Backend) -> None:
        await self.internal.ReportBackend(
            internal_pb.ReportBackendRequest(deployment=deployment, backend=backend)
        )

    def watch(self, pool: str = "", metadata: Any = SERVICE) -> Any:
        """Starts a call of `WatchDeployments`."""
        request = internal_pb.WatchDeploymentsRequest(pool=pool)
        return self.internal.WatchDeployments(request, metadata=metadata)

    async def register(self, model: str, *versions: str, manifest: Any = CHAT) -> str:
        """Creates a model with versions of one artifact; returns the digest."""
        digest = await self.upload(artifact(manifest))
        await self.create_model(model)
        for version in versions:
            await self.create_version(f"models/{model}/versions/{version}", digest)
        return digest


@asynccontextmanager
async def serving_registry(
    url: str, folder: Path, *, limits: UploadLimits | None = None
) -> AsyncIterator[RegistryClient]:
    """Runs a registry in this process, with a real server and database; yields a client."""
    await migrate(url, "registry")
    engine = create_engine(url)
    store = RegistryStore(engine)
    feed = DeploymentFeed(store)
    artifacts = open_store((folder / "artifacts").as_uri())
    clock = SystemClock()
    servicer = RegistryServicer(
        store=store,
        artifacts=artifacts,
        feed=feed,
        limits=limits or UploadLimits(),
        provider_hosts=ProviderHosts(AddressPolicy()),
        clock=clock,
    )
    internal = RegistryInternalServicer(store=store, artifacts=artifacts, feed=feed, clock=clock)

    def register(server: grpc.aio.Server) -> None:
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(servicer, server)
        registry_internal_pb2_grpc.add_RegistryInternalServiceServicer_to_server(internal, server)

    pushing = asyncio.create_task(feed.run())
    try:
        async with serving(register) as address, open_channel(address, traced=False) as channel:
            yield RegistryClient(channel, address)
            feed.close()
    finally:
        pushing.cancel()
        await asyncio.gather(pushing, return_exceptions=True)
        await engine.dispose()
