"""The tokens of a conversation, counted by the model that would answer it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from headrace.common.v1 import model_pb2

from libs.chat.request import GenerationRequest
from libs.errors import InvalidArgument
from libs.routes import RouteTable
from services.inference.backends.pool import Backends, Lease
from services.inference.backends.triton import count_request
from services.inference.domain import BackendFailedError, Route
from services.inference.routing import route_of
from services.inference.tensors import calls
from services.inference.tensors.codec import StreamedResponse
from services.inference.tensors.retry import Retrier


@dataclass(frozen=True)
class TokenCount:
    """How many tokens a prompt has, and which version counted them."""

    prompt_tokens: int
    route: Route


class TokenCounter:
    """Counts without generating, so that nothing is billed."""

    def __init__(self, *, routes: Callable[[], RouteTable], backends: Backends) -> None:
        self._routes = routes
        self._attempts = Retrier(backends)

    async def count(self, request: GenerationRequest) -> TokenCount:
        """Returns how many tokens the prompt of a request has.

        Raises:
            HeadraceError: see `InferenceService.CountTokens`.
        """
        if wrong := request.violations():
            raise InvalidArgument.of_fields(wrong)
        choice = self._routes().choose(request.model, kind=model_pb2.MODEL_KIND_CHAT)

        async def attempt(lease: Lease) -> int:
            counts: list[int] = []

            async def take(_message: bytes, streamed: StreamedResponse) -> None:
                if streamed.answered.final:
                    counts.append(int(json.loads(streamed.answered.final)["prompt_tokens"]))

            message = count_request(lease.backend.backend_model, request.messages)
            await calls.stream(lease.triton, message, request_id="", take=take)
            if not counts:
                raise BackendFailedError("the stream ended without a count")
            return counts[0]

        return TokenCount(await self._attempts.run(choice, attempt), route_of(choice))
