"""From the router's snapshot to plain data."""

from __future__ import annotations

from libs.routes import Choice
from services.inference.domain import Route


def route_of(choice: Choice) -> Route:
    """Returns what clients may know of a choice: no backends."""
    target = choice.target
    return Route(
        deployment=target.deployment,
        reason=choice.reason,
        model_version=target.model_version,
        artifact_digest=target.artifact_digest,
    )
