"""The records of the registry. Plain Python: time and ids are arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Generic, TypeAlias, TypeVar

import semver

from libs.model_reference import version_name
from libs.rpc.names import resource_name

DEFAULT_POOL = "default"
PROVIDER_ID = "provider"


class Kind(Enum):
    """What a model does."""

    CHAT = "chat"
    EMBEDDING = "embedding"


class State(Enum):
    """The state of a version on a backend."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


class DeploymentState(Enum):
    """Whether a deployment serves requests."""

    PENDING = "pending"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True)
class Schema:
    """What a version accepts and returns; a limit of 0 does not apply to its kind."""

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
class TritonTarget:
    """A version on a Triton server.

    Attributes:
        address: `host:port` of its gRPC endpoint.
        model: the name of the version there.
    """

    address: str
    model: str


@dataclass(frozen=True)
class ProviderTarget:
    """A version at an external provider.

    Attributes:
        base_url: the URL to which `/chat/completions` is appended.
        model: the provider's name of the model.
        api_key_name: the file that holds the key; empty: the provider needs none.
    """

    base_url: str
    model: str
    api_key_name: str = ""


Target: TypeAlias = TritonTarget | ProviderTarget
T_co = TypeVar("T_co", bound=Target, covariant=True)


@dataclass(frozen=True)
class Manifest:
    """What an artifact says about itself."""

    schema: Schema
    provider: ProviderTarget | None = None


@dataclass(frozen=True)
class ModelVersion:
    """One version of a model; it never changes."""

    model: str
    version: semver.Version
    artifact_digest: str
    schema: Schema
    lineage: Lineage
    create_time: datetime
    provider: ProviderTarget | None = None

    @property
    def name(self) -> str:
        """`models/{model}/versions/{version}`."""
        return version_name(self.model, str(self.version))

    @property
    def artifact_file_name(self) -> str:
        """`{model}-{version}-{timestamp}`, the time in UTC and ISO 8601's basic form."""
        return f"{self.model}-{self.version}-{self.create_time:%Y%m%dT%H%M%SZ}"


@dataclass(frozen=True)
class Backend(Generic[T_co]):
    """A version on one Triton server, as its pool agent reported it, or at its provider.

    Attributes:
        update_time: when it last reported; two reports that differ only in it are equal.
    """

    id: str
    state: State
    target: T_co
    artifact_digest: str = ""
    message: str = ""
    update_time: datetime | None = field(default=None, compare=False)


TritonBackend: TypeAlias = "Backend[TritonTarget]"


@dataclass(frozen=True)
class Deployment:
    """A version that a pool or a provider serves.

    Attributes:
        spec_revision: the revision of the deployments at which the spec last changed.
        reported: the backends of the pool, by id.
    """

    id: str
    model_version: ModelVersion
    pool: str
    create_time: datetime
    update_time: datetime
    spec_revision: int = 0
    reported: tuple[TritonBackend, ...] = ()

    @property
    def name(self) -> str:
        """`deployments/{id}`."""
        return resource_name("deployments", self.id)

    @property
    def etag(self) -> str:
        """Another one for each spec that this name ever had, also across deletions."""
        return f"{self.spec_revision:016x}"

    @property
    def backends(self) -> tuple[Backend[Target], ...]:
        """The backends of the pool; the provider, always ready, where one runs the version."""
        provider = self.model_version.provider
        if provider is None:
            return self.reported
        ready = Backend(
            PROVIDER_ID,
            State.READY,
            provider,
            artifact_digest=self.model_version.artifact_digest,
        )
        return (ready,)

    @property
    def state(self) -> DeploymentState:
        """READY with one ready backend of the right artifact, FAILED if all reported failures."""
        backends = self.backends
        digest = self.model_version.artifact_digest
        if any(one.state is State.READY and one.artifact_digest == digest for one in backends):
            return DeploymentState.READY
        if backends and all(one.state is State.FAILED for one in backends):
            return DeploymentState.FAILED
        return DeploymentState.PENDING


@dataclass(frozen=True)
class SpecChange:
    """What an update changes of a spec; None leaves a field as it is.

    Attributes:
        version: the model and the version.
        pool: the name of the pool.
    """

    version: tuple[str, semver.Version] | None = None
    pool: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """All deployments by name, and the revision that grows with each change of them."""

    revision: int
    deployments: tuple[Deployment, ...]

    def of_pool(self, pool: str) -> tuple[Deployment, ...]:
        """Returns the deployments of one pool; of all pools if it is empty."""
        return tuple(one for one in self.deployments if pool in ("", one.pool))


def precedence_key(version: semver.Version) -> str:
    """Returns a text whose byte order is the order of precedence (semver 2.0, §11).

    Numbers are prefixed with their length; a release comes after its pre-releases (`~` after
    digits); a numeric identifier (`0`) before others (`1`); the end of an identifier (`!`) before
    any of its characters. Build metadata has no precedence: it only makes the order total.
    """
    release = "".join(map(_sortable_number, (version.major, version.minor, version.patch)))
    identifiers = version.prerelease.split(".") if version.prerelease else []
    prerelease = "".join(
        f"0{_sortable_number(int(one))}" if one.isdecimal() else f"1{one}!" for one in identifiers
    )
    return f"{release}{prerelease or '~'} {version.build or ''}"


def _sortable_number(number: int) -> str:
    return f"{len(str(number)):02}{number}"
