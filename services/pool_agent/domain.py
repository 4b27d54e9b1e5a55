"""What a pool serves, and how its parts are called."""

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
    """A version that the pool is asked to serve; several deployments may ask for the same.

    Attributes:
        model: its identifier.
        version: its semantic version.
        artifact_digest: `sha256:` and 64 hex digits.
    """

    model: str
    version: str
    artifact_digest: str
    kind: Kind

    @property
    def backend_model(self) -> str:
        """The name under which Triton has the version: also its folder's name.

        It says which artifact it is, so that a name is never loaded with two contents. A semantic
        version's `+` is left out of folder names and URLs.
        """
        digits = self.artifact_digest.removeprefix(_DIGEST_PREFIX)[:_DIGEST_DIGITS]
        return f"{self.model}-{self.version.replace('+', '_')}-{digits}"


@dataclass(frozen=True)
class Report:
    """What this backend tells of a version."""

    backend_model: str
    state: State
    artifact_digest: str = ""
    message: str = ""


@dataclass(frozen=True)
class Backoff:
    """How long to wait after failures in a row: twice as long each time, up to a limit."""

    first_seconds: float = 1.0
    max_seconds: float = 15.0

    def seconds(self, failures: int) -> float:
        """Returns the pause after so many failures, one at least."""
        return float(min(self.first_seconds * 2 ** min(failures - 1, 30), self.max_seconds))
