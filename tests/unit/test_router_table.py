"""How a request finds its deployment."""

from __future__ import annotations

import pytest
from headrace.common.v1 import backend_pb2, model_pb2, route_pb2
from headrace.router.v1 import router_internal_pb2 as router_pb2

from libs.errors import InvalidArgument, NotFound, Unavailable
from libs.routes import (
    EMPTY,
    MAX_MODELS_IN_ERRORS,
    MAX_NAME_LENGTH_IN_ERRORS,
    Kind,
    RouteTable,
)

CHAT = model_pb2.MODEL_KIND_CHAT
EMBEDDING = model_pb2.MODEL_KIND_EMBEDDING
DIGEST = "sha256:" + "a" * 64


def target(
    version: str,
    *,
    model: str = "smollm2",
    deployment: str | None = None,
    ready: bool = True,
    kind: Kind = CHAT,
) -> router_pb2.RouteTarget:
    backend = backend_pb2.Backend(
        status=model_pb2.BackendStatus(
            id="triton-0", state=model_pb2.BACKEND_STATE_READY, artifact_digest=DIGEST
        ),
        triton=backend_pb2.TritonTarget(address="127.0.0.1:1", model="m"),
    )
    return router_pb2.RouteTarget(
        deployment=f"deployments/{deployment or 'd-' + version.replace('.', '-')}",
        model_version=f"models/{model}/versions/{version}",
        artifact_digest=DIGEST,
        schema=model_pb2.ModelSchema(kind=kind),
        backends=[backend] if ready else [],
    )


def table(**routes: list[router_pb2.RouteTarget]) -> RouteTable:
    return RouteTable.of(
        router_pb2.WatchRoutesResponse(
            epoch="epoch",
            revision=7,
            routes=[
                router_pb2.ModelRoute(model=name, targets=targets)
                for name, targets in routes.items()
            ],
        )
    )


def test_a_bare_name_means_the_first_ready_target():
    """Targets come best first, so a bare name means the best one that is ready."""
    routes = table(smollm2=[target("1.10.0"), target("1.9.0"), target("2.0.0", ready=False)])
    choice = routes.choose("smollm2", kind=CHAT)
    assert choice.target.model_version == "models/smollm2/versions/1.10.0"
    assert choice.reason == "highest ready version: 1.10.0"
    assert choice.model == "smollm2"
    assert choice.decision() == route_pb2.RouteDecision(
        deployment="deployments/d-1-10-0",
        reason="highest ready version: 1.10.0",
        epoch="epoch",
        revision=7,
    )


def test_the_other_ready_versions_of_a_bare_name_are_its_fallbacks():
    """Best first, of the same kind; a name with a version has only fallbacks of that version."""
    routes = table(
        smollm2=[
            target("2.0.0"),
            target("1.9.0", ready=False),
            target("1.8.0"),
            target("1.7.0", kind=EMBEDDING),
            target("1.6.0"),
            target("1.6.0", deployment="spare"),
        ]
    )

    def fallbacks(name: str) -> list[str]:
        return [each.deployment for each in routes.choose(name, kind=CHAT).fallbacks]

    assert fallbacks("smollm2") == [f"deployments/{n}" for n in ("d-1-8-0", "d-1-6-0", "spare")]
    assert fallbacks("smollm2@2.0.0") == []
    assert fallbacks("smollm2@1.6.0") == ["deployments/spare"]


@pytest.mark.parametrize("name", ["smollm2@1.9.0", "models/smollm2/versions/1.9.0"])
def test_a_version_is_served_by_exactly_that_version(name):
    """A request that names a version gets it, even if a higher one is ready."""
    choice = table(smollm2=[target("1.10.0"), target("1.9.0")]).choose(name, kind=None)
    assert choice.target.model_version == "models/smollm2/versions/1.9.0"
    assert choice.reason == "version asked for: 1.9.0"
    assert choice.model == "smollm2"


def test_of_two_deployments_of_a_version_the_ready_one_answers():
    """Deployments of one version in two pools replace each other."""
    routes = table(
        smollm2=[target("1.0.0", deployment="b"), target("1.0.0", deployment="a", ready=False)]
    )
    assert routes.choose("smollm2@1.0.0", kind=CHAT).target.deployment == "deployments/b"


@pytest.mark.parametrize(
    "name", ["gpt-9", "", "smollm2@9.9.9", "smollm2@", "models/smollm2", "models/gpt-9/versions/1"]
)
def test_the_error_of_an_unknown_model_lists_those_that_exist(name):
    """Programs and people can find the right name in it."""
    with pytest.raises(NotFound) as raised:
        table(smollm2=[target("1.0.0")], minilm=[target("1.0.0", model="minilm")]).choose(
            name, kind=CHAT
        )
    assert raised.value.reason == "MODEL_NOT_FOUND"
    assert raised.value.metadata == {"model": name, "models": "minilm,smollm2"}


def test_an_error_fits_into_trailers():
    """GRPC can send the error of a huge name, and the names of a thousand models."""
    many = {f"m{number}": [target("1.0.0", model=f"m{number}")] for number in range(1000)}
    with pytest.raises(NotFound) as raised:
        table(**many).choose("x" * 1_000_000, kind=CHAT)
    assert len(raised.value.metadata["model"]) == MAX_NAME_LENGTH_IN_ERRORS
    assert raised.value.metadata["models"].count(",") == MAX_MODELS_IN_ERRORS - 1
    assert len(raised.value.message) < 2 * MAX_NAME_LENGTH_IN_ERRORS


@pytest.mark.parametrize("name", ["smollm2", "smollm2@1.0.0"])
def test_a_model_that_no_backend_has_ready_may_be_tried_again(name):
    """Loading is not an error of the caller: `UNAVAILABLE` with a delay for the retry."""
    with pytest.raises(Unavailable) as raised:
        table(smollm2=[target("1.0.0", ready=False)]).choose(name, kind=CHAT)
    assert raised.value.reason == "MODEL_NOT_READY"
    assert raised.value.metadata == {"model": name}
    assert raised.value.retry_after_seconds == 1.0


@pytest.mark.parametrize("ready", [True, False])
def test_a_model_of_another_kind_is_refused_ready_or_not(ready):
    """A chat request to an embedding model will not succeed later either."""
    routes = table(minilm=[target("1.0.0", model="minilm", kind=EMBEDDING, ready=ready)])
    with pytest.raises(InvalidArgument) as raised:
        routes.choose("minilm", kind=CHAT)
    assert raised.value.reason == "MODEL_KIND_MISMATCH"
    assert raised.value.metadata == {"model": "minilm", "kind": "embedding"}


def test_the_kind_decides_among_versions_of_several_kinds():
    """Where a model changed its kind, the best version of the right kind answers."""
    routes = table(smollm2=[target("2.0.0", kind=EMBEDDING), target("1.0.0")])
    assert routes.choose("smollm2", kind=CHAT).target.model_version.endswith("/1.0.0")
    assert routes.choose("smollm2", kind=None).target.model_version.endswith("/2.0.0")


def test_models_lists_every_deployed_name_sorted():
    """Also models that are not ready exist."""
    routes = table(smollm2=[target("1.0.0", ready=False)], minilm=[target("1.0.0", model="minilm")])
    assert routes.models() == ["minilm", "smollm2"]
    assert EMPTY.models() == []


def test_backends_of_unknown_kinds_are_no_candidates():
    """A newer registry may know more kinds than a reader can call, which then removes them."""
    newer, both = target("2.0.0"), target("1.0.0")
    newer.backends[0].ClearField("triton")  # as a target is read that this version does not know
    both.backends.add().MergeFrom(newer.backends[0])
    routes = table(smollm2=[newer, both]).with_backends(
        lambda backend: backend.WhichOneof("target") is not None
    )
    assert (routes.epoch, routes.revision) == ("epoch", 7)
    choice = routes.choose("smollm2", kind=CHAT)
    assert choice.target.deployment == "deployments/d-1-0-0"
    assert [backend.WhichOneof("target") for backend in choice.target.backends] == ["triton"]
    assert choice.fallbacks == ()
    with pytest.raises(Unavailable):
        routes.choose("smollm2@2.0.0", kind=CHAT)
    assert all(backend.HasField("triton") for backend in routes.backends())
    assert {each.deployment for each in routes.targets()} == {
        "deployments/d-2-0-0",
        "deployments/d-1-0-0",
    }


@pytest.mark.parametrize(
    ("epoch", "revision", "replaces"),
    [("epoch", 8, True), ("epoch", 7, False), ("epoch", 6, False), ("other", 1, True)],
)
def test_a_snapshot_replaces_an_older_one_and_those_of_other_epochs(epoch, revision, replaces):
    """A router that restarts counts from 1; within its life, revisions grow."""
    snapshot = router_pb2.WatchRoutesResponse(epoch=epoch, revision=revision)
    assert table().is_replaced_by(snapshot) is replaces
