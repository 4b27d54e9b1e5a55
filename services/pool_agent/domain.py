"""What a pool serves and reports. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

_DIGEST_PREFIX = "sha256:"
_DIGEST_DIGITS = 12


class Kind(Enum):
    """What a model does."""

    CHAT = "chat"
    EMBEDDING = "embedding"


class State(Enum):
    """The state of a version on this backend."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True)
class Wanted:
    """A version that the pool must serve; several deployments may want the same one.

    Attributes:
        model: the id of the model.
        version: the semantic version.
        artifact_digest: `sha256:` and 64 hex digits.
    """

    model: str
    version: str
    artifact_digest: str
    kind: Kind

    @property
    def backend_model(self) -> str:
        """The name of the version on Triton, and of its folder.

        It contains digits of the digest, so that one name never has two contents. The `+` of
        semantic versions is replaced: it has a meaning in URLs.
        """
        digits = self.artifact_digest.removeprefix(_DIGEST_PREFIX)[:_DIGEST_DIGITS]
        return f"{self.model}-{self.version.replace('+', '_')}-{digits}"


@dataclass(frozen=True)
class Report:
    """The state of a version on this backend.

    Attributes:
        artifact_digest: empty until the artifact is verified.
        message: for users: without addresses, paths and secrets.
    """

    backend_model: str
    state: State
    artifact_digest: str = ""
    message: str = ""


@dataclass(frozen=True)
class Backoff:
    """The pauses after failures in a row: twice as long each time, up to a limit."""

    first_seconds: float = 1.0
    max_seconds: float = 15.0

    def seconds(self, failures: int) -> float:
        """Returns the pause after this many failures, at least one."""
        return float(min(self.first_seconds * 2 ** min(failures - 1, 30), self.max_seconds))
