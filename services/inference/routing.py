"""Where a request runs: the router's snapshot applied to it, as plain data."""

from __future__ import annotations

from headrace.common.v1.model_pb2 import MODEL_KIND_CHAT

from libs.chat.request import GenerationRequest
from libs.model_reference import at_version
from libs.routes import Choice, RouteTable
from services.inference.domain import Route


def choose_chat(routes: RouteTable, request: GenerationRequest) -> Choice:
    """Returns which deployment answers; a resumed answer stays with the version that started it.

    Raises:
        HeadraceError: see `RouteTable.choose`.
    """
    choice = routes.choose(request.model, kind=MODEL_KIND_CHAT)
    point = request.resume_point
    if point is None or point.version == route_of(choice).version:
        return choice
    return routes.choose(at_version(choice.model, point.version), kind=MODEL_KIND_CHAT)


def counts_tokens(choice: Choice) -> bool:
    """Returns whether the backends report tokens; providers do not, they report chunks."""
    return all(backend.WhichOneof("target") != "provider" for backend in choice.target.backends)


def route_of(choice: Choice) -> Route:
    """Returns what clients may know of a choice: no backends."""
    target = choice.target
    return Route(
        deployment=target.deployment,
        reason=choice.reason,
        epoch=choice.epoch,
        revision=choice.revision,
        model_version=target.model_version,
        artifact_digest=target.artifact_digest,
    )
