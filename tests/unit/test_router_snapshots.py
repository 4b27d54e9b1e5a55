"""From deployments to routes."""

from __future__ import annotations

import random

import pytest
import semver
from google.protobuf.timestamp_pb2 import Timestamp
from headrace.common.v1 import backend_pb2, model_pb2
from headrace.registry.v1.registry_internal_pb2 import DeploymentEntry, WatchDeploymentsResponse
from hypothesis import given
from hypothesis import strategies as st

from libs.errors import NotFound, Unavailable
from libs.routes import RouteTable
from services.router.metrics import SKIPPED
from services.router.snapshots import RouteSnapshots
from services.router.wire import routes_from_proto

DIGEST = "sha256:" + "a" * 64
OTHER = "sha256:" + "b" * 64
READY = model_pb2.BACKEND_STATE_READY
LOADING = model_pb2.BACKEND_STATE_LOADING
FAILED = model_pb2.BACKEND_STATE_FAILED


def backend(
    state: model_pb2.BackendState.ValueType = READY,
    digest: str = DIGEST,
    identifier: str = "triton-0",
    message: str = "",
    reported: int = 1,
) -> backend_pb2.Backend:
    return backend_pb2.Backend(
        status=model_pb2.BackendStatus(
            id=identifier,
            state=state,
            artifact_digest=digest,
            message=message,
            update_time=Timestamp(seconds=reported),
        ),
        triton=backend_pb2.TritonTarget(address="h:1", model="m"),
    )


def deployment(
    name: str,
    version: str = "1.0.0",
    *backends: backend_pb2.Backend,
    model: str = "smollm2",
    created: int = 0,
) -> DeploymentEntry:
    return DeploymentEntry(
        name=f"deployments/{name}",
        model_version=f"models/{model}/versions/{version}",
        artifact_digest=DIGEST,
        schema=model_pb2.ModelSchema(kind=model_pb2.MODEL_KIND_CHAT, context_tokens=8),
        backends=backends,
        create_time=Timestamp(seconds=created),
    )


def order(*deployments: DeploymentEntry) -> list[str]:
    """Returns the deployments of the only model, best first."""
    (route,) = routes_from_proto(deployments)
    return [target.deployment.removeprefix("deployments/") for target in route.targets]


def test_the_highest_version_comes_first_whatever_was_created_last():
    """By semantic precedence: 1.10.0 is higher than 1.9.0, and 2.0.0-rc.1 lower than 2.0.0."""
    assert order(
        deployment("a", "1.9.0", backend(), created=4),
        deployment("b", "2.0.0-rc.1", backend(), created=3),
        deployment("c", "1.10.0", backend(), created=2),
        deployment("d", "2.0.0", backend(), created=1),
    ) == ["d", "b", "c", "a"]


def test_of_equal_versions_the_newest_deployment_comes_first():
    """Build metadata makes no version higher."""
    assert order(
        deployment("a", "1.0.0+z", backend(), created=1),
        deployment("b", "1.0.0", backend(), created=3),
        deployment("c", "1.0.0+a", backend(), created=2),
    ) == ["b", "c", "a"]


@pytest.mark.parametrize(
    "unready", [[], [backend(LOADING)], [backend(FAILED)], [backend(READY, OTHER)]]
)
def test_what_is_not_ready_comes_last_and_has_no_backends(unready):
    """A backend is ready only with exactly the artifact of the version."""
    deployments = [deployment("new", "2.0.0", *unready), deployment("old", "1.0.0", backend())]
    assert order(*deployments) == ["old", "new"]
    (route,) = routes_from_proto(deployments)
    assert list(route.targets[1].backends) == []


def test_a_target_has_the_ready_backends_and_the_fields_of_the_deployment():
    """A reader needs nothing else to send a request there."""
    one = deployment(
        "a", "1.0.0", backend(), backend(LOADING, identifier="t-1"), backend(identifier="t-2")
    )
    (route,) = routes_from_proto([one])
    (target,) = route.targets
    assert [ready.status.id for ready in target.backends] == ["triton-0", "t-2"]
    assert target.schema == one.schema
    assert (target.model_version, target.artifact_digest) == (one.model_version, DIGEST)


def test_every_deployed_model_has_a_route_by_name():
    """Also a model that is not ready yet: it exists."""
    routes = routes_from_proto([deployment("b", model="smollm2"), deployment("a", model="minilm")])
    assert [route.model for route in routes] == ["minilm", "smollm2"]


numbers = st.integers(0, 12)
deployed = st.builds(
    lambda major, minor, pre, ready: (f"{major}.{minor}.0{pre}", ready),
    numbers,
    numbers,
    st.sampled_from(["", "-rc.1", "-rc.10", "+b"]),
    st.booleans(),
)


@given(st.lists(deployed, min_size=1, max_size=8), st.randoms())
def test_the_choice_is_a_highest_ready_version(found: list[tuple[str, bool]], rng: random.Random):
    """For any deployments, in any order: the first choice is ready, and no ready one is higher."""
    deployments = [
        deployment(f"d{number}", version, *([backend()] if ready else []), created=number)
        for number, (version, ready) in enumerate(found)
    ]
    rng.shuffle(deployments)
    table = RouteTable(epoch="e", revision=1, routes=routes_from_proto(deployments))
    ready_versions = [semver.Version.parse(version) for version, ready in found if ready]
    if not ready_versions:
        with pytest.raises(Unavailable):
            table.choose("smollm2", kind=None)
        return
    chosen = table.choose("smollm2", kind=None).target
    assert chosen.backends
    version = semver.Version.parse(chosen.model_version.rpartition("/")[2])
    assert version.compare(max(ready_versions)) == 0


async def test_only_what_changes_a_route_is_a_new_snapshot():
    """Agents report many steps of loading, and repeat reports; readers need neither."""
    snapshots = RouteSnapshots("epoch")
    sent = snapshots.follow()
    take(snapshots, deployment("a", "1.0.0", backend(LOADING, message="fetching")))
    assert (await anext(sent)).revision == 1
    take(snapshots, deployment("a", "1.0.0", backend(LOADING, message="warming")))
    take(snapshots, deployment("a", "1.0.0", backend()))
    ready = await anext(sent)
    assert (ready.epoch, ready.revision) == ("epoch", 2)
    assert len(ready.routes[0].targets[0].backends) == 1
    take(snapshots, deployment("a", "1.0.0", backend(reported=2)))
    assert snapshots.table().choose("smollm2", kind=None).revision == 2


async def test_a_registry_without_deployments_is_a_snapshot_too():
    """In an empty mesh no model exists; that is another state than an unknown one."""
    snapshots = RouteSnapshots("epoch")
    take(snapshots)
    assert list((await anext(snapshots.follow())).routes) == []


def take(snapshots: RouteSnapshots, *deployments: DeploymentEntry) -> None:
    snapshots.take(WatchDeploymentsResponse(deployments=deployments))


async def test_a_deployment_that_changes_its_version_moves_to_the_new_one():
    """Under either version's name only what is ready of that version answers."""
    snapshots = RouteSnapshots("epoch")
    take(snapshots, deployment("a", "1.0.0", backend()))
    assert snapshots.table().choose("smollm2@1.0.0", kind=None).target.backends
    take(snapshots, deployment("a", "2.0.0"))
    with pytest.raises(Unavailable):
        snapshots.table().choose("smollm2", kind=None)
    with pytest.raises(NotFound):
        snapshots.table().choose("smollm2@1.0.0", kind=None)
    take(snapshots, deployment("a", "2.0.0", backend()))
    choice = snapshots.table().choose("smollm2", kind=None)
    assert choice.target.model_version == "models/smollm2/versions/2.0.0"
    assert choice.decision().epoch == "epoch"


@pytest.mark.parametrize(
    "bad",
    [
        deployment("bad", "one"),
        deployment("bad", model="No"),
        DeploymentEntry(name="deployments/bad"),
        deployment("bad", created=10**12),
    ],
    ids=["version", "model", "empty", "time"],
)
async def test_a_deployment_that_cannot_be_read_does_not_stop_the_others(bad):
    """It is skipped, logged and counted; an error would stop all updates of routes."""
    snapshots = RouteSnapshots("epoch")
    before = SKIPPED._value.get()
    take(snapshots, bad, deployment("a", "1.0.0", backend()))
    assert snapshots.table().choose("smollm2", kind=None).target.deployment == "deployments/a"
    assert snapshots.table().models() == ["smollm2"]
    assert SKIPPED._value.get() == before + 1
