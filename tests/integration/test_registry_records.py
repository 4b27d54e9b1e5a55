"""Models, versions and deployments, through a real server and real databases."""

from __future__ import annotations

import pytest
from headrace.common.v1 import backend_pb2, model_pb2
from headrace.registry.v1 import registry_internal_pb2 as internal_pb
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
from tests.support.registry import (
    CHAT,
    EMBEDDING,
    OPERATOR,
    REGISTRAR,
    SERVICE,
    USER,
    artifact,
    backend,
    ready_backend,
)
from tests.support.registry_fixtures import database_url, module_postgres, running_registry  # noqa: F401  # fixtures

pytestmark = pytest.mark.integration


async def test_a_model_is_found_as_it_was_created(registry):
    """What was created is what is read."""
    created = await registry.create_model("smollm2", "small")
    assert created.name == "models/smollm2"
    assert created.HasField("create_time")
    found = await registry.stub.GetModel(pb.GetModelRequest(name="models/smollm2"))
    assert found.model == created


async def test_a_name_is_taken_once(registry):
    """A second resource of the same name is refused."""
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


async def test_a_version_has_the_schema_of_its_artifact(registry):
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
async def test_an_invalid_page_token_is_refused(registry, token):
    """On every database alike."""
    with pytest.raises(InvalidArgument) as raised, headrace_errors():
        await registry.stub.ListModels(pb.ListModelsRequest(page_token=token))
    assert raised.value.field_violations[0][0] == "page_token"


async def test_a_version_needs_its_model_and_its_artifact(registry):
    """Only a stored artifact can become a version."""
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
    """The error names the field, before anything is looked up."""
    with pytest.raises(InvalidArgument) as raised, headrace_errors():
        await registry.create_version(name, digest)
    assert raised.value.reason == "INVALID_FIELD"
    assert raised.value.field_violations[0][0] == field


async def test_a_deployment_needs_its_version(registry):
    """Only a registered version can be deployed."""
    with pytest.raises(FailedPrecondition) as raised, headrace_errors():
        await registry.deploy("deployments/d", "models/smollm2/versions/1.0.0")
    assert raised.value.reason == "RESOURCE_NOT_FOUND"
    assert raised.value.resource == "models/smollm2/versions/1.0.0"
    await registry.register("smollm2", "1.0.0")
    for name, pool, field in [("d", "", "name"), ("deployments/d", "No", "spec.pool")]:
        with pytest.raises(InvalidArgument) as invalid, headrace_errors():
            await registry.deploy(name, "models/smollm2/versions/1.0.0", pool)
        assert invalid.value.field_violations[0][0] == f"deployment.{field}"


async def test_a_deployment_has_its_versions_artifact_and_schema(registry):
    """The status has both, so that no second call is needed."""
    digest = await registry.register("smollm2", "1.0.0")
    created = await registry.deploy("deployments/d", "models/smollm2/versions/1.0.0")
    assert created.status.artifact_digest == digest
    assert created.status.schema.context_tokens == CHAT["context_tokens"]
    assert created.status.state == pb.DEPLOYMENT_STATE_PENDING
    assert created.spec == pb.DeploymentSpec(
        model_version="models/smollm2/versions/1.0.0", pool="default"
    )
    assert created.etag
    assert created.update_time == created.create_time
    assert await registry.get("deployments/d") == created
    await registry.undeploy("deployments/d")
    with pytest.raises(NotFound), headrace_errors():
        await registry.get("deployments/d")
    with pytest.raises(NotFound), headrace_errors():
        await registry.undeploy("deployments/d")


async def test_a_version_at_a_provider_is_deployed_and_ready_at_once(registry):
    """Its address and key are in the full view of the version and in the watch, nowhere else."""
    provider = {"base_url": "https://api.example.com/v1", "model": "gpt-9", "api_key_name": "key"}
    digest = await registry.register("gpt", "1.0.0", manifest=CHAT | {"provider": provider})
    deployment = await registry.deploy("deployments/gpt", "models/gpt/versions/1.0.0")
    status = model_pb2.BackendStatus(
        id="provider", state=model_pb2.BACKEND_STATE_READY, artifact_digest=digest
    )
    assert list(deployment.status.backends) == [status]
    assert deployment.status.state == pb.DEPLOYMENT_STATE_READY
    listed = await registry.stub.ListDeployments(pb.ListDeploymentsRequest())
    assert list(listed.deployments) == [deployment]
    (entry,) = (await registry.watch().read()).deployments
    target = backend_pb2.ProviderTarget(**provider)
    assert entry.provider == target
    assert list(entry.backends) == [backend_pb2.Backend(status=status, provider=target)]
    with pytest.raises(InvalidArgument), headrace_errors():
        await registry.report(deployment.name, backend())


async def test_only_admins_see_the_provider_of_a_version(registry):
    """The full view has its URL and the name of its key."""
    provider = {"base_url": "https://api.example.com/v1", "model": "gpt-9", "api_key_name": "key"}
    await registry.register("gpt", "1.0.0", manifest=CHAT | {"provider": provider})
    get = pb.GetModelVersionRequest(name="models/gpt/versions/1.0.0")
    listing = pb.ListModelVersionsRequest(parent="models/gpt")
    for view in (pb.MODEL_VERSION_VIEW_UNSPECIFIED, pb.MODEL_VERSION_VIEW_BASIC):
        get.view = listing.view = view
        found = (await registry.stub.GetModelVersion(get, metadata=USER)).model_version
        assert not found.HasField("provider")
        (listed,) = (await registry.stub.ListModelVersions(listing, metadata=USER)).model_versions
        assert listed == found
    get.view = listing.view = pb.MODEL_VERSION_VIEW_FULL
    full = (await registry.stub.GetModelVersion(get, metadata=OPERATOR)).model_version
    assert full.provider == backend_pb2.ProviderTarget(**provider)
    (listed,) = (await registry.stub.ListModelVersions(listing, metadata=OPERATOR)).model_versions
    assert listed == full
    for call in (
        registry.stub.GetModelVersion(get, metadata=USER),
        registry.stub.ListModelVersions(listing, metadata=USER),
    ):
        with pytest.raises(PermissionDenied) as raised, headrace_errors():
            await call
        assert raised.value.reason == "SCOPE_MISSING"


async def test_backends_are_what_agents_reported_last(registry):
    """One entry a backend, replaced by each report; a wrong artifact changes nothing."""
    digest = await registry.register("smollm2", "1.0.0")
    await registry.deploy("deployments/d", "models/smollm2/versions/1.0.0")
    await registry.deploy("deployments/e", "models/smollm2/versions/1.0.0")
    ready = ready_backend(digest, message="warmed", address="127.0.0.1:8001", model="smollm2-1.0.0")
    loading = backend(state=model_pb2.BACKEND_STATE_LOADING)
    other = backend("triton-1", message="no")
    for report in (loading, other, ready, ready):
        await registry.report("deployments/d", report)
    entries = (await registry.watch().read()).deployments
    for entry in entries:
        for reported in entry.backends:
            assert reported.status.HasField("update_time")
            reported.status.ClearField("update_time")
    assert [list(entry.backends) for entry in entries] == [[ready, other], []]
    with pytest.raises(FailedPrecondition) as raised, headrace_errors():
        await registry.report("deployments/d", ready_backend("sha256:" + "0" * 64))
    assert raised.value.reason == "DIGEST_MISMATCH"
    with pytest.raises(NotFound), headrace_errors():
        await registry.report("deployments/none", ready)
    for wrong in (
        backend(state=model_pb2.BACKEND_STATE_UNSPECIFIED),
        backend_pb2.Backend(status=ready.status),
        backend_pb2.Backend(status=ready.status, provider=backend_pb2.ProviderTarget()),
    ):
        with pytest.raises(InvalidArgument), headrace_errors():
            await registry.report("deployments/d", wrong)


async def test_users_see_the_state_of_backends_without_addresses(registry):
    """The message is redacted; the spec has not changed, so the etag has not either."""
    digest = await registry.register("smollm2", "1.0.0")
    created = await registry.deploy("deployments/d", "models/smollm2/versions/1.0.0")
    await registry.report("deployments/d", backend(message="/srv/a.py: 10.0.0.1:80 refused"))
    found = await registry.get("deployments/d")
    assert found.status.state == pb.DEPLOYMENT_STATE_FAILED
    (status,) = found.status.backends
    assert (status.id, status.message) == ("triton-0", "<path>: <address> refused")
    assert status.HasField("update_time")
    await registry.report("deployments/d", ready_backend(digest))
    found = await registry.get("deployments/d")
    assert found.status.state == pb.DEPLOYMENT_STATE_READY
    assert (found.etag, found.update_time) == (created.etag, created.update_time)


async def test_a_repeated_report_changes_its_time_only(registry):
    """Watches get nothing; `GetDeployment` shows that the backend is alive."""
    await registry.register("smollm2", "1.0.0")
    await registry.deploy("deployments/d", "models/smollm2/versions/1.0.0")
    await registry.report("deployments/d", backend())
    revision = (await registry.watch().read()).revision
    (first,) = (await registry.get("deployments/d")).status.backends
    await registry.report("deployments/d", backend())
    (second,) = (await registry.get("deployments/d")).status.backends
    assert second.update_time.ToNanoseconds() > first.update_time.ToNanoseconds()
    assert (await registry.watch().read()).revision == revision


@pytest.mark.parametrize(
    ("method", "request_type"),
    [
        ("CreateModel", pb.CreateModelRequest),
        ("CreateModelVersion", pb.CreateModelVersionRequest),
        ("CreateDeployment", pb.CreateDeploymentRequest),
        ("UpdateDeployment", pb.UpdateDeploymentRequest),
        ("DeleteDeployment", pb.DeleteDeploymentRequest),
    ],
)
async def test_changes_need_the_scope_registry(registry, method, request_type):
    """Users of models may not change them."""
    call = getattr(registry.stub, method)
    with pytest.raises(PermissionDenied) as raised, headrace_errors():
        await call(request_type(), metadata=USER)
    assert raised.value.reason == "SCOPE_MISSING"
    assert raised.value.metadata == {"scope": "registry"}
    with pytest.raises(Unauthenticated), headrace_errors():
        await call(request_type(), metadata=())


async def test_users_cannot_call_what_only_the_mesh_may(registry):
    """Not even operators: no token has the scope, and the edge has no route to these RPCs."""
    digest = await registry.register("smollm2", "1.0.0")
    await registry.deploy("deployments/d", "models/smollm2/versions/1.0.0")
    for metadata in (USER, REGISTRAR):
        for call in (
            registry.download(digest, metadata=metadata),
            registry.internal.ReportBackend(
                internal_pb.ReportBackendRequest(deployment="deployments/d"), metadata=metadata
            ),
            anext(aiter(registry.watch(metadata=metadata))),
        ):
            with pytest.raises(PermissionDenied) as raised, headrace_errors():
                await call
            assert raised.value.metadata == {"scope": "internal"}
    assert await registry.download(digest, metadata=SERVICE) == artifact(CHAT)
