"""The number of tokens of a conversation, counted by the model that would answer it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from headrace.common.v1 import model_pb2

from libs.chat.request import GenerationRequest
from libs.errors import InvalidArgument
from libs.routes import RouteTable
from services.inference.backends.pool import Backends, Lease
from services.inference.domain import Route
from services.inference.routing import route_of
from services.inference.tensors.retry import Retrier


@dataclass(frozen=True)
class TokenCount:
    """How many tokens a prompt has, and which version counted them."""

    prompt_tokens: int
    route: Route


class TokenCounter:
    """Counts tokens. Nothing is generated, so nothing is billed."""

    def __init__(self, *, routes: Callable[[], RouteTable], backends: Backends) -> None:
        self._routes = routes
        self._retrier = Retrier(backends)

    async def count(
        self, request: GenerationRequest, *, deadline_seconds: float | None = None
    ) -> TokenCount:
        """Returns how many tokens the prompt of a request has.

        Args:
            request: only its model and its messages matter.
            deadline_seconds: when the caller gives up, on the clock's monotonic time.

        Raises:
            HeadraceError: see `InferenceService.CountTokens`.
        """
        if wrong := request.violations():
            raise InvalidArgument.of_fields(wrong)
        choice = self._routes().choose(request.model, kind=model_pb2.MODEL_KIND_CHAT)

        async def attempt(lease: Lease) -> int:
            return await lease.triton.count_tokens(
                lease.target.model, request.messages, deadline_seconds=deadline_seconds
            )

        return TokenCount(await self._retrier.run(choice, attempt), route_of(choice))
