"""The registry's rules."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import semver
from hypothesis import given
from hypothesis import strategies as st

from libs.errors import FailedPrecondition, InvalidArgument
from services.registry.domain import (
    DEFAULT_POOL,
    MAX_LINEAGE_LENGTH,
    MAX_MESSAGE_LENGTH,
    Backend,
    BackendKind,
    Deployment,
    Kind,
    Lineage,
    ModelVersion,
    Provider,
    Schema,
    Snapshot,
    State,
    check_backend,
    check_digest,
    check_lineage,
    check_pool,
    check_report,
    new_model,
    precedence_key,
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
    return Deployment(identifier, version(), pool, NOW)


def backend(**fields) -> Backend:
    ready = Backend(
        id="triton-0",
        address="127.0.0.1:8001",
        backend_model="smollm2-1.0.0-aaaaaaaaaaaa",
        state=State.READY,
        artifact_digest=DIGEST,
        message="",
    )
    return replace(ready, **fields)


@given(st.lists(versions, max_size=8))
def test_keys_sort_as_versions_precede(found):
    """A database that compares bytes lists versions in the order of semver."""
    by_key = sorted(found, key=precedence_key)
    assert all(one.compare(other) <= 0 for one, other in itertools.pairwise(by_key))


@given(versions, versions)
def test_no_two_versions_share_a_key(one, other):
    """A key tells where a page ended, so it must name one version."""
    assert (precedence_key(one) == precedence_key(other)) == (str(one) == str(other))


def test_the_example_of_the_semver_specification_is_in_order():
    """Section 11.4 of the specification, and numbers of several digits."""
    ordered = [
        "1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2",
        "1.0.0-beta.11", "1.0.0-rc.1", "1.0.0", "1.9.0", "1.10.0",
    ]  # fmt: skip
    keys = [precedence_key(semver.Version.parse(text)) for text in ordered]
    assert keys == sorted(keys)


def test_names_and_file_names_follow_from_what_they_name():
    """Nobody chooses them, so nobody can choose them wrongly."""
    one = version("1.2.3-rc.1")
    assert one.name == "models/smollm2/versions/1.2.3-rc.1"
    assert one.artifact_file_name == "smollm2-1.2.3-rc.1-20261123T040506Z"
    assert deployment("d-1").name == "deployments/d-1"


@pytest.mark.parametrize(
    "name",
    ["", "smollm2", "models/", "models/Smol", "models/1a", "models/a/b", "models/" + "a" * 64],
)
def test_a_model_needs_a_name_of_the_right_form(name):
    """The name becomes part of addresses and file names."""
    with pytest.raises(InvalidArgument) as raised:
        new_model(name=name, description="", now=NOW)
    assert raised.value.field_violations[0][0] == "model.name"


@pytest.mark.parametrize(
    "digest",
    ["", "a" * 64, "sha256:" + "A" * 64, "sha256:" + "a" * 63, DIGEST + "\n", "../" + DIGEST],
)
def test_what_is_no_digest_is_refused(digest):
    """A digest becomes a file's name; nothing else may."""
    with pytest.raises(InvalidArgument) as raised:
        check_digest(digest, field="metadata.digest")
    assert raised.value.field_violations[0][0] == "metadata.digest"


def test_an_empty_pool_is_the_default_one():
    """Who has one pool need not name it."""
    assert check_pool("") == DEFAULT_POOL
    assert check_pool("gpu-2") == "gpu-2"
    with pytest.raises(InvalidArgument):
        check_pool("GPU")


def test_lineage_has_a_limit():
    """It is a reference, not a place to keep things."""
    assert check_lineage(Lineage("a" * MAX_LINEAGE_LENGTH)).training_run
    with pytest.raises(InvalidArgument) as raised:
        check_lineage(Lineage(dataset="a" * (MAX_LINEAGE_LENGTH + 1)))
    assert raised.value.field_violations[0][0] == "model_version.lineage.dataset"


@pytest.mark.parametrize("field", ["address", "backend_model", "artifact_digest"])
def test_a_ready_backend_says_how_to_reach_it(field):
    """A route to nowhere is no route. A loading backend may not know yet."""
    with pytest.raises(InvalidArgument) as raised:
        check_backend(backend(**{field: ""}))
    assert raised.value.field_violations[0][0] == f"backend.{field}"
    loading = backend(**{field: "", "state": State.LOADING})
    assert check_backend(loading) == loading


@pytest.mark.parametrize("identifier", ["", "a b", "a/b", "-a", "a" * 64])
def test_a_backend_needs_an_id(identifier):
    """It tells the backends of a pool apart."""
    with pytest.raises(InvalidArgument) as raised:
        check_backend(backend(id=identifier))
    assert raised.value.field_violations[0][0] == "backend.id"


def test_a_long_message_is_cut_and_not_refused():
    """A backend in trouble must be able to say so."""
    kept = check_backend(backend(message="x" * 10_000))
    assert len(kept.message) == MAX_MESSAGE_LENGTH


def test_nul_characters_are_refused_or_replaced():
    """PostgreSQL keeps none: what SQLite would take must not fail elsewhere."""
    with pytest.raises(InvalidArgument) as raised:
        new_model(name="models/a", description="a\0b", now=NOW)
    assert raised.value.field_violations[0][0] == "model.description"
    with pytest.raises(InvalidArgument):
        check_lineage(Lineage(dataset="\0"))
    with pytest.raises(InvalidArgument):
        check_backend(backend(address="\0"))
    assert "\0" not in check_backend(backend(message="bad\0bytes")).message


def test_a_backend_with_another_artifact_is_never_ready():
    """Nothing is served under a version's name but that version."""
    other = "sha256:" + "b" * 64
    with pytest.raises(FailedPrecondition) as raised:
        check_report(backend(artifact_digest=other), deployment())
    assert raised.value.reason == "DIGEST_MISMATCH"
    assert raised.value.metadata == {"expected_digest": DIGEST, "actual_digest": other}
    check_report(backend(artifact_digest=other, state=State.LOADING), deployment())
    check_report(backend(), deployment())


def test_a_version_at_a_provider_is_ready_without_any_report():
    """No agent loads it, so none reports it; and none may."""
    provider = Provider("https://api.example.com/v1", "gpt-9", "example")
    deployed = replace(deployment(), model_version=replace(version(), provider=provider))
    (ready,) = deployed.backends
    assert (ready.id, ready.kind, ready.state) == ("provider", BackendKind.OPENAI, State.READY)
    assert (ready.address, ready.backend_model) == ("https://api.example.com/v1", "gpt-9")
    assert (ready.api_key_name, ready.artifact_digest) == ("example", DIGEST)
    with pytest.raises(InvalidArgument) as raised:
        check_report(backend(), deployed)
    assert raised.value.field_violations[0][0] == "deployment"
    with pytest.raises(InvalidArgument):
        check_backend(backend(kind=BackendKind.OPENAI))


def test_a_pool_sees_its_own_deployments():
    """An agent loads what its pool was asked to serve, and nothing else."""
    snapshot = Snapshot(1, (deployment("a"), deployment("b", "gpu")))
    assert [one.id for one in snapshot.of_pool("gpu")] == ["b"]
    assert [one.id for one in snapshot.of_pool("")] == ["a", "b"]
