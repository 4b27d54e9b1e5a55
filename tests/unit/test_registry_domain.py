"""The records and rules of the registry."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import semver
from hypothesis import given
from hypothesis import strategies as st

from libs.errors import Aborted, FailedPrecondition, InvalidArgument
from libs.redaction import MAX_TEXT_LENGTH
from services.registry.domain import (
    DEFAULT_POOL,
    Backend,
    Deployment,
    DeploymentState,
    Kind,
    Lineage,
    ModelVersion,
    ProviderTarget,
    Schema,
    Snapshot,
    State,
    TritonBackend,
    TritonTarget,
    precedence_key,
)
from services.registry.rules import (
    MAX_LINEAGE_LENGTH,
    check_backend,
    check_digest,
    check_etag,
    check_lineage,
    check_pool,
    check_report,
    new_model,
)

NOW = datetime(2026, 11, 23, 4, 5, 6, 789, tzinfo=UTC)
DIGEST = "sha256:" + "a" * 64

numbers = st.integers(min_value=0, max_value=10**20)
identifiers = numbers.map(str) | st.from_regex(r"[0-9]*[A-Za-z-][0-9A-Za-z-]{0,4}", fullmatch=True)
prereleases = st.lists(identifiers, max_size=4).map(".".join)
versions = st.builds(
    semver.Version,
    major=st.integers(0, 3) | numbers,
    minor=st.integers(0, 3) | numbers,
    patch=st.integers(0, 3) | numbers,
    prerelease=prereleases.map(lambda text: text or None),
    build=st.none() | st.sampled_from(["1", "a", "a.b"]),
)

SCHEMA = Schema(Kind.CHAT, context_tokens=8, max_output_tokens=4)


def version(text: str = "1.0.0") -> ModelVersion:
    return ModelVersion("smollm2", semver.Version.parse(text), DIGEST, SCHEMA, Lineage(), NOW)


def deployment(identifier: str = "d", pool: str = "default") -> Deployment:
    return Deployment(identifier, version(), pool, create_time=NOW, update_time=NOW)


TARGET = TritonTarget("127.0.0.1:8001", "smollm2-1.0.0-aaaaaaaaaaaa")


def backend(**fields) -> TritonBackend:
    ready = Backend("triton-0", State.READY, TARGET, artifact_digest=DIGEST)
    return replace(ready, **fields)


@given(st.lists(versions, max_size=8))
def test_keys_sort_as_versions_precede(found):
    """A database that compares bytes lists versions in the order of semver."""
    by_key = sorted(found, key=precedence_key)
    assert all(one.compare(other) <= 0 for one, other in itertools.pairwise(by_key))


@given(versions, versions)
def test_no_two_versions_share_a_key(one, other):
    """A page token is the key of the last version, so it must identify one version."""
    assert (precedence_key(one) == precedence_key(other)) == (str(one) == str(other))


def test_the_example_of_the_semver_specification_is_in_order():
    """Section 11.4 of the specification, and numbers of several digits."""
    ordered = [
        "1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2",
        "1.0.0-beta.11", "1.0.0-rc.1", "1.0.0", "1.9.0", "1.10.0",
    ]  # fmt: skip
    keys = [precedence_key(semver.Version.parse(text)) for text in ordered]
    assert keys == sorted(keys)


def test_names_and_file_names_are_derived():
    """They are derived, so they cannot be wrong."""
    one = version("1.2.3-rc.1")
    assert one.name == "models/smollm2/versions/1.2.3-rc.1"
    assert one.artifact_file_name == "smollm2-1.2.3-rc.1-20261123T040506Z"
    assert deployment("d-1").name == "deployments/d-1"


@pytest.mark.parametrize(
    "name",
    ["", "smollm2", "models/", "models/Smol", "models/1a", "models/a/b", "models/" + "a" * 64],
)
def test_a_model_needs_a_name_of_the_right_form(name):
    """The name becomes part of URLs and file names."""
    with pytest.raises(InvalidArgument) as raised:
        new_model(name=name, description="", now=NOW)
    assert raised.value.field_violations[0][0] == "model.name"


@pytest.mark.parametrize(
    "digest",
    ["", "a" * 64, "sha256:" + "A" * 64, "sha256:" + "a" * 63, DIGEST + "\n", "../" + DIGEST],
)
def test_an_invalid_digest_is_refused(digest):
    """A digest becomes a file name, so nothing else may pass."""
    with pytest.raises(InvalidArgument) as raised:
        check_digest(digest, field="metadata.digest")
    assert raised.value.field_violations[0][0] == "metadata.digest"


def test_an_empty_pool_is_the_default_one():
    """Users with one pool need not name it."""
    assert check_pool("") == DEFAULT_POOL
    assert check_pool("gpu-2") == "gpu-2"
    with pytest.raises(InvalidArgument):
        check_pool("GPU")


def test_lineage_has_a_limit():
    """It refers to data elsewhere and does not store it."""
    assert check_lineage(Lineage("a" * MAX_LINEAGE_LENGTH)).training_run
    with pytest.raises(InvalidArgument) as raised:
        check_lineage(Lineage(dataset="a" * (MAX_LINEAGE_LENGTH + 1)))
    assert raised.value.field_violations[0][0] == "model_version.lineage.dataset"


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("triton.address", {"target": TritonTarget("", "m")}),
        ("triton.model", {"target": TritonTarget("a:1", "")}),
        ("status.artifact_digest", {"artifact_digest": ""}),
    ],
)
def test_a_ready_backend_has_what_is_needed_to_call_it(field, fields):
    """A backend that is loading may not know it yet."""
    with pytest.raises(InvalidArgument) as raised:
        check_backend(backend(**fields))
    assert raised.value.field_violations[0][0] == f"backend.{field}"
    loading = backend(**fields, state=State.LOADING)
    assert check_backend(loading) == loading


@pytest.mark.parametrize("identifier", ["", "a b", "a/b", "-a", "a" * 64])
def test_a_backend_needs_an_id(identifier):
    """It identifies the backend in its pool."""
    with pytest.raises(InvalidArgument) as raised:
        check_backend(backend(id=identifier))
    assert raised.value.field_violations[0][0] == "backend.status.id"


def test_a_long_message_is_cut_and_not_refused():
    """A backend that fails must be able to report it."""
    kept = check_backend(backend(message="x" * 10_000))
    assert len(kept.message) == MAX_TEXT_LENGTH


def test_a_message_is_redacted():
    """Every user with the scope `read` can see it."""
    report = backend(state=State.FAILED, message="read /home/ann/model.py at 10.0.0.1:8001: no")
    assert check_backend(report).message == "read <path> at <address>: no"


def test_two_reports_that_differ_in_their_time_only_are_equal():
    """A repeated report is not a change, and is not pushed to those who watch."""
    assert backend(update_time=NOW) == backend(update_time=None)


def test_nul_characters_are_refused_or_replaced():
    """PostgreSQL accepts none: what SQLite would accept must not fail there."""
    with pytest.raises(InvalidArgument) as raised:
        new_model(name="models/a", description="a\0b", now=NOW)
    assert raised.value.field_violations[0][0] == "model.description"
    with pytest.raises(InvalidArgument):
        check_lineage(Lineage(dataset="\0"))
    with pytest.raises(InvalidArgument):
        check_backend(backend(target=TritonTarget("\0", "m")))
    assert "\0" not in check_backend(backend(message="bad\0bytes")).message


def test_a_backend_with_another_artifact_is_never_ready():
    """Under a version's name nothing else is served."""
    other = "sha256:" + "b" * 64
    with pytest.raises(FailedPrecondition) as raised:
        check_report(backend(artifact_digest=other), deployment())
    assert raised.value.reason == "DIGEST_MISMATCH"
    assert raised.value.metadata == {"expected_digest": DIGEST, "actual_digest": other}
    check_report(backend(artifact_digest=other, state=State.LOADING), deployment())
    check_report(backend(), deployment())


def test_a_version_at_a_provider_is_ready_without_any_report():
    """No agent loads it, so none may report it."""
    provider = ProviderTarget("https://api.example.com/v1", "gpt-9", "example")
    deployed = replace(deployment(), model_version=replace(version(), provider=provider))
    (ready,) = deployed.backends
    assert (ready.id, ready.target, ready.state) == ("provider", provider, State.READY)
    assert ready.artifact_digest == DIGEST
    assert deployed.state is DeploymentState.READY
    with pytest.raises(InvalidArgument) as raised:
        check_report(backend(), deployed)
    assert raised.value.field_violations[0][0] == "deployment"


OTHER_DIGEST = "sha256:" + "b" * 64


@pytest.mark.parametrize(
    ("reported", "state"),
    [
        ([], DeploymentState.PENDING),
        ([State.LOADING], DeploymentState.PENDING),
        ([State.FAILED, State.LOADING], DeploymentState.PENDING),
        ([State.FAILED], DeploymentState.FAILED),
        ([State.FAILED, State.FAILED], DeploymentState.FAILED),
        ([State.READY], DeploymentState.READY),
        ([State.FAILED, State.LOADING, State.READY], DeploymentState.READY),
    ],
)
def test_one_ready_backend_makes_a_deployment_ready(reported, state):
    """It has failed only once all backends have; until then it may become ready."""
    backends = tuple(
        backend(id=f"triton-{number}", state=each) for number, each in enumerate(reported)
    )
    assert replace(deployment(), reported=backends).state is state


def test_a_backend_with_another_artifact_does_not_make_a_deployment_ready():
    """It serves the version before the update."""
    stale = backend(artifact_digest=OTHER_DIGEST)
    assert replace(deployment(), reported=(stale,)).state is DeploymentState.PENDING


def test_a_stale_etag_aborts_and_an_empty_one_matches():
    """A client that has not read the newest spec must not replace it by accident."""
    current = replace(deployment(), spec_revision=7)
    check_etag(current, "")
    check_etag(current, current.etag)
    with pytest.raises(Aborted) as raised:
        check_etag(current, replace(current, spec_revision=6).etag)
    assert raised.value.reason == "ETAG_MISMATCH"
    assert raised.value.metadata == {"resource": "deployments/d"}


def test_a_pool_sees_its_own_deployments():
    """An agent loads the deployments of its pool, and nothing else."""
    snapshot = Snapshot(1, (deployment("a"), deployment("b", "gpu")))
    assert [one.id for one in snapshot.of_pool("gpu")] == ["b"]
    assert [one.id for one in snapshot.of_pool("")] == ["a", "b"]
