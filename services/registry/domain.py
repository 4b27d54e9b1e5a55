"""What the registry knows, and the rules of it. Plain Python: time and digests are arguments."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum

import semver

from libs.errors import FailedPrecondition, InvalidArgument
from libs.model_reference import version_name
from libs.rpc.names import parse_name, resource_name

DEFAULT_POOL = "default"
MAX_DESCRIPTION_LENGTH = 4096
MAX_LINEAGE_LENGTH = 1024
MAX_ADDRESS_LENGTH = 512
# What a backend says of itself is cut, not refused: it has no other way to tell its trouble.
MAX_MESSAGE_LENGTH = 2048

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_POOL = re.compile(r"[a-z][a-z0-9-]{0,62}")
_BACKEND_ID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


class Kind(Enum):
    """What a model does."""

    CHAT = "chat"
    EMBEDDING = "embedding"


class BackendKind(Enum):
    """What a backend speaks."""

    TRITON = "triton"
    OPENAI = "openai"


class State(Enum):
    """The state of a version on a backend."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True)
class Schema:
    """What a version takes and gives; 0 where a kind has no such limit."""

    kind: Kind
    context_tokens: int = 0
    max_output_tokens: int = 0
    dimensions: int = 0
    max_input_tokens: int = 0
    max_concurrent_requests: int = 0


@dataclass(frozen=True)
class Model:
    """A public name."""

    id: str
    description: str
    create_time: datetime

    @property
    def name(self) -> str:
        """`models/{id}`."""
        return resource_name("models", self.id)


@dataclass(frozen=True)
class Lineage:
    """Where a version comes from."""

    training_run: str = ""
    dataset: str = ""
    source_revision: str = ""


@dataclass(frozen=True)
class Provider:
    """An external provider that runs a version in place of a pool.

    Attributes:
        base_url: what `/chat/completions` follows.
        model: the provider's own name of the model.
        api_key_name: the file that holds the key; empty where none is needed.
    """

    base_url: str
    model: str
    api_key_name: str = ""


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself."""

    schema: Schema
    provider: Provider | None = None


@dataclass(frozen=True)
class ModelVersion:
    """One version of a model; never changes."""

    model: str
    version: semver.Version
    artifact_digest: str
    schema: Schema
    lineage: Lineage
    create_time: datetime
    provider: Provider | None = None

    @property
    def name(self) -> str:
        """`models/{model}/versions/{version}`."""
        return version_name(self.model, str(self.version))

    @property
    def artifact_file_name(self) -> str:
        """`{model}-{version}-{timestamp}`, the time in UTC and ISO 8601's basic form."""
        return f"{self.model}-{self.version}-{self.create_time:%Y%m%dT%H%M%SZ}"


@dataclass(frozen=True)
class Backend:
    """A version on one Triton, as that Triton's pool agent reported it, or at its provider."""

    id: str
    address: str
    backend_model: str
    state: State
    artifact_digest: str
    message: str
    kind: BackendKind = BackendKind.TRITON
    api_key_name: str = ""


@dataclass(frozen=True)
class Deployment:
    """A version that a pool serves, or its provider.

    Attributes:
        reported: the backends of the pool, by id.
    """

    id: str
    model_version: ModelVersion
    pool: str
    create_time: datetime
    reported: tuple[Backend, ...] = ()

    @property
    def backends(self) -> tuple[Backend, ...]:
        """The backends of the pool; where a provider runs the version, that one, always ready."""
        provider = self.model_version.provider
        if provider is None:
            return self.reported
        return (_at_provider(provider, self.model_version.artifact_digest),)

    @property
    def name(self) -> str:
        """`deployments/{id}`."""
        return resource_name("deployments", self.id)


@dataclass(frozen=True)
class Snapshot:
    """All deployments by name, and the revision that grows with each change of them."""

    revision: int
    deployments: tuple[Deployment, ...]

    def of_pool(self, pool: str) -> tuple[Deployment, ...]:
        """Returns the deployments of one pool; of all where it is empty."""
        return tuple(one for one in self.deployments if pool in ("", one.pool))


def new_model(*, name: str, description: str, now: datetime) -> Model:
    """Makes a model.

    Raises:
        InvalidArgument: a field is wrong.
    """
    _check_text("model.description", description, MAX_DESCRIPTION_LENGTH)
    return Model(parse_name(name, "models", field="model.name"), description, now)


def check_lineage(lineage: Lineage) -> Lineage:
    """Returns the lineage.

    Raises:
        InvalidArgument: a field is too long.
    """
    for field in ("training_run", "dataset", "source_revision"):
        _check_text(f"model_version.lineage.{field}", getattr(lineage, field), MAX_LINEAGE_LENGTH)
    return lineage


def check_pool(pool: str) -> str:
    """Returns the name of the pool that was asked for.

    Raises:
        InvalidArgument: it is no name of a pool.
    """
    if pool and not _POOL.fullmatch(pool):
        raise InvalidArgument.of_field(
            "deployment.pool", "must be of a-z, 0-9 and -, from a letter, up to 63"
        )
    return pool or DEFAULT_POOL


def check_backend(backend: Backend) -> Backend:
    """Returns what is kept of a backend's report.

    Raises:
        InvalidArgument: a field is wrong, or a ready backend does not say how to reach it.
    """
    wrong = []
    if backend.kind is not BackendKind.TRITON:
        wrong.append(("backend.kind", "must be TRITON: providers are in the artifact"))
    if not _BACKEND_ID.fullmatch(backend.id):
        wrong.append(("backend.id", "must be of letters, digits, ., _ and -, up to 63"))
    if backend.state is State.READY:
        wrong += [
            (f"backend.{field}", "must be set where the state is READY")
            for field in ("address", "backend_model", "artifact_digest")
            if not getattr(backend, field)
        ]
    if wrong:
        raise InvalidArgument.of_fields(wrong)
    for field in ("address", "backend_model", "artifact_digest"):
        _check_text(f"backend.{field}", getattr(backend, field), MAX_ADDRESS_LENGTH)
    message = backend.message.replace("\0", "�")[:MAX_MESSAGE_LENGTH]
    return replace(backend, message=message)


def check_report(backend: Backend, deployment: Deployment) -> None:
    """Returns if a deployment takes this report of a backend.

    Raises:
        InvalidArgument: a provider runs the deployment.
        FailedPrecondition: the backend is ready with another artifact than the version's; nothing
            is served under a version's name but that version.
    """
    version = deployment.model_version
    if version.provider is not None:
        raise InvalidArgument.of_field("deployment", "is run by a provider, not by a pool")
    if backend.state is State.READY and backend.artifact_digest != version.artifact_digest:
        raise FailedPrecondition(
            f"{backend.id} has another artifact than {version.name}",
            reason="DIGEST_MISMATCH",
            metadata={
                "expected_digest": version.artifact_digest,
                "actual_digest": backend.artifact_digest,
            },
        )


def check_digest(digest: str, *, field: str) -> str:
    """Returns the digest if it is one.

    Raises:
        InvalidArgument: it is not `sha256:` and 64 lower-case hex digits.
    """
    if not _DIGEST.fullmatch(digest):
        raise InvalidArgument.of_field(field, "must be sha256: and 64 hex digits, lower case")
    return digest


def precedence_key(version: semver.Version) -> str:
    """Returns a text that sorts, byte by byte, as versions precede one another (semver 2.0, §11).

    Numbers come after their length; a release after its pre-releases (`~` after digits); a
    numeric identifier (`0`) before others (`1`); the end of an identifier (`!`) before any of its
    characters. Build metadata has no precedence: it only makes the order total.
    """
    release = "".join(map(_sortable_number, (version.major, version.minor, version.patch)))
    identifiers = version.prerelease.split(".") if version.prerelease else []
    prerelease = "".join(
        f"0{_sortable_number(int(one))}" if one.isdecimal() else f"1{one}!" for one in identifiers
    )
    return f"{release}{prerelease or '~'} {version.build or ''}"


def _sortable_number(number: int) -> str:
    return f"{len(str(number)):02}{number}"


def _check_text(field: str, value: str, limit: int) -> None:
    if "\0" in value:  # PostgreSQL keeps none
        raise InvalidArgument.of_field(field, "has a NUL character")
    if len(value) > limit:
        raise InvalidArgument.of_field(field, f"has {len(value)} characters, more than {limit}")


def _at_provider(provider: Provider, artifact_digest: str) -> Backend:
    return Backend(
        id="provider",
        address=provider.base_url,
        backend_model=provider.model,
        state=State.READY,
        artifact_digest=artifact_digest,
        message="",
        kind=BackendKind.OPENAI,
        api_key_name=provider.api_key_name,
    )
