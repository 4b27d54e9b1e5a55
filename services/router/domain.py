"""The order in which the deployments of a model are chosen. Plain Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import semver


@dataclass(frozen=True)
class Candidate:
    """A deployment that may answer.

    Attributes:
        deployment: its name.
        model: the id of the model.
        ready: whether a backend serves exactly the artifact of its version.
        create_nanos: when it was created, in nanoseconds since 1970.
    """

    deployment: str
    model: str
    version: semver.Version
    ready: bool
    create_nanos: int


def candidates_by_model(candidates: Iterable[Candidate]) -> Mapping[str, Sequence[Candidate]]:
    """Returns the candidates of each model, the models by name, the best candidate first.

    A ready candidate comes before others, then the highest version by semantic precedence, then
    the deployment that was created last.
    """
    by_model: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_model.setdefault(candidate.model, []).append(candidate)
    return {model: sorted(by_model[model], key=_rank, reverse=True) for model in sorted(by_model)}


def _rank(candidate: Candidate) -> tuple[bool, semver.Version, int, str]:
    return candidate.ready, candidate.version, candidate.create_nanos, candidate.deployment
