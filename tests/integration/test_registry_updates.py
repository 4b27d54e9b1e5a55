"""Changes of deployments, etags, and filters of lists, on both databases."""

from __future__ import annotations

import pytest
from headrace.common.v1 import model_pb2
from headrace.registry.v1 import registry_pb2 as pb

from libs.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound
from libs.rpc.status import headrace_errors
from tests.support.registry import CHAT, artifact, backend, ready_backend
from tests.support.registry_fixtures import database_url, module_postgres, running_registry  # noqa: F401  # fixtures

pytestmark = pytest.mark.integration

OLD, NEW = (f"models/smollm2/versions/{version}" for version in ("1.0.0", "2.0.0"))
NAME = "deployments/d"


@pytest.fixture
async def deployed(registry):
    """A registry with two versions of a model, of which the first is deployed and ready."""
    digest = await registry.register("smollm2", "1.0.0", "2.0.0")
    await registry.deploy(NAME, OLD)
    await registry.report(NAME, ready_backend(digest))
    return registry


async def test_an_update_changes_the_version_and_forgets_the_reports_about_the_old_one(deployed):
    """Nothing is served under the new version's name before a backend reports it."""
    before = await deployed.get(NAME)
    watch = deployed.watch()
    assert len((await watch.read()).deployments[0].backends) == 1
    after = await deployed.update(NAME, "spec.model_version", version=NEW)
    assert (after.spec.model_version, after.spec.pool) == (NEW, "default")
    assert after.status.state == pb.DEPLOYMENT_STATE_PENDING
    assert list(after.status.backends) == []
    assert after.etag != before.etag
    assert after.update_time.ToNanoseconds() > before.update_time.ToNanoseconds()
    assert after.create_time == before.create_time
    assert await deployed.get(NAME) == after
    (entry,) = (await watch.read()).deployments
    assert (entry.model_version, list(entry.backends)) == (NEW, [])


async def test_an_update_of_the_pool_moves_the_deployment(deployed):
    """The agents of both pools are sent their new deployments."""
    watch = deployed.watch("gpu")
    assert list((await watch.read()).deployments) == []
    after = await deployed.update(NAME, "spec.pool", pool="gpu", version="is not read")
    assert (after.spec.model_version, after.spec.pool) == (OLD, "gpu")
    assert [entry.name for entry in (await watch.read()).deployments] == [NAME]
    assert list((await deployed.watch("default").read()).deployments) == []


@pytest.mark.parametrize("paths", [(), ("*",), ("spec",), ("spec.pool", "spec.model_version")])
async def test_an_update_without_a_narrower_mask_replaces_the_spec(deployed, paths):
    """An empty pool is the default one, as when a deployment is created."""
    await deployed.update(NAME, "spec.pool", pool="gpu")
    after = await deployed.update(NAME, *paths, version=NEW)
    assert (after.spec.model_version, after.spec.pool) == (NEW, "default")


async def test_an_update_that_changes_nothing_keeps_everything(deployed):
    """Etag, time and backends: the deployment goes on serving, and nothing is pushed."""
    before = await deployed.get(NAME)
    revision = (await deployed.watch().read()).revision
    assert await deployed.update(NAME, version=OLD, etag=before.etag) == before
    assert await deployed.get(NAME) == before
    assert (await deployed.watch().read()).revision == revision


async def test_a_stale_etag_changes_nothing(deployed):
    """A client with an older spec must read it again before replacing it."""
    stale = (await deployed.get(NAME)).etag
    after = await deployed.update(NAME, version=NEW, etag=stale)
    with pytest.raises(Aborted) as raised, headrace_errors():
        await deployed.update(NAME, version=OLD, etag=stale)
    assert raised.value.reason == "ETAG_MISMATCH"
    assert raised.value.metadata == {"resource": NAME}
    with pytest.raises(Aborted), headrace_errors():
        await deployed.undeploy(NAME, etag=stale)
    assert await deployed.get(NAME) == after
    await deployed.undeploy(NAME, etag=after.etag)


async def test_an_etag_never_comes_back(deployed):
    """Neither when a spec does, nor when a deployment of that name is created again."""
    etags = {(await deployed.get(NAME)).etag}
    etags.add((await deployed.update(NAME, version=NEW)).etag)
    etags.add((await deployed.update(NAME, version=OLD)).etag)
    await deployed.undeploy(NAME)
    etags.add((await deployed.deploy(NAME, OLD)).etag)
    assert len(etags) == 4


@pytest.mark.parametrize(
    ("paths", "fields", "field"),
    [
        (["spec.version"], {}, "update_mask"),
        (["status"], {}, "update_mask"),
        (["etag", "spec"], {}, "update_mask"),
        ([], {"version": ""}, "deployment.spec.model_version"),
        (["spec.model_version"], {"version": "smollm2@2.0.0"}, "deployment.spec.model_version"),
        (["spec.model_version"], {"version": "models/other/versions/1.0.0"},
         "deployment.spec.model_version"),
        (["spec.pool"], {"pool": "No"}, "deployment.spec.pool"),
    ],
)  # fmt: skip
async def test_a_malformed_update_is_refused_by_field(deployed, paths, fields, field):
    """A deployment stays with its model; only its spec can be changed."""
    with pytest.raises(InvalidArgument) as raised, headrace_errors():
        await deployed.update(NAME, *paths, **fields)
    assert raised.value.field_violations[0][0] == field


async def test_an_update_needs_its_deployment_and_its_version(deployed):
    """Both are named in the error."""
    with pytest.raises(NotFound) as missing, headrace_errors():
        await deployed.update("deployments/none", version=NEW)
    assert missing.value.resource == "deployments/none"
    with pytest.raises(FailedPrecondition) as raised, headrace_errors():
        await deployed.update(NAME, version="models/smollm2/versions/3.0.0")
    assert raised.value.reason == "RESOURCE_NOT_FOUND"
    assert raised.value.resource == "models/smollm2/versions/3.0.0"


async def test_a_late_report_about_the_old_version_does_not_make_the_new_one_ready(deployed):
    """An agent may report before it has received the update."""
    other = await deployed.upload(artifact(CHAT, payload=b"other"))
    await deployed.create_version("models/smollm2/versions/3.0.0", other)
    old = (await deployed.get(NAME)).status.artifact_digest
    await deployed.update(NAME, version="models/smollm2/versions/3.0.0")
    with pytest.raises(FailedPrecondition), headrace_errors():
        await deployed.report(NAME, ready_backend(old))
    await deployed.report(NAME, backend(state=model_pb2.BACKEND_STATE_LOADING, digest=old))
    assert (await deployed.get(NAME)).status.state == pb.DEPLOYMENT_STATE_PENDING


async def test_lists_are_filtered(registry):
    """By exact values; a name of another form matches nothing."""
    digest = await registry.register("a", "1.0.0", "2.0.0")
    await registry.register("b", "1.0.0", manifest=CHAT | {"context_tokens": 9})
    await registry.deploy("deployments/x", "models/a/versions/1.0.0")
    await registry.deploy("deployments/y", "models/a/versions/1.0.0", pool="gpu")
    await registry.deploy("deployments/z", "models/b/versions/1.0.0", pool="gpu")

    async def models(text: str) -> list[str]:
        page = await registry.stub.ListModels(pb.ListModelsRequest(filter=text))
        return [one.name for one in page.models]

    async def versions(text: str) -> list[str]:
        request = pb.ListModelVersionsRequest(parent="models/a", filter=text)
        page = await registry.stub.ListModelVersions(request)
        return [one.name.rpartition("/")[2] for one in page.model_versions]

    async def deployments(text: str) -> list[str]:
        page = await registry.stub.ListDeployments(pb.ListDeploymentsRequest(filter=text))
        return [one.name.rpartition("/")[2] for one in page.deployments]

    assert await models("") == ["models/a", "models/b"]
    assert await models('name = "models/b"') == ["models/b"]
    assert await models('name = "b"') == []
    assert await models('name = "deployments/b"') == []
    assert await versions(f'artifact_digest = "{digest}"') == ["2.0.0", "1.0.0"]
    assert await versions('artifact_digest = "sha256:0"') == []
    assert await deployments('spec.pool = "gpu"') == ["y", "z"]
    assert await deployments('spec.model_version = "models/a/versions/1.0.0"') == ["x", "y"]
    both = 'spec.model_version = "models/a/versions/1.0.0" AND spec.pool = "gpu"'
    assert await deployments(both) == ["y"]
    assert await deployments('spec.model_version = "a@1.0.0"') == []
    for request in (models, versions, deployments):
        with pytest.raises(InvalidArgument) as raised, headrace_errors():
            await request('color = "red"')
        assert raised.value.field_violations[0][0] == "filter"


async def test_pages_of_a_filtered_list_have_every_match_once(registry):
    """Also when rows are added between two pages."""
    await registry.register("a", "1.0.0")
    for number in range(6):
        pool = "gpu" if number % 2 else ""
        await registry.deploy(f"deployments/d{number}", "models/a/versions/1.0.0", pool=pool)
    request = pb.ListDeploymentsRequest(filter='spec.pool = "gpu"', page_size=1)
    found = []
    for _ in range(3):
        page = await registry.stub.ListDeployments(request)
        found += [one.name.rpartition("/")[2] for one in page.deployments]
        request.page_token = page.next_page_token
        if len(found) == 1:
            await registry.deploy("deployments/a0", "models/a/versions/1.0.0", pool="gpu")
    assert (found, request.page_token) == (["d1", "d3", "d5"], "")
