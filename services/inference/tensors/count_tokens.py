"""The number of tokens of a conversation, counted by the model that would answer it."""

from __future__ import annotations

from collections.abc import Callable

from headrace.common.v1 import model_pb2
from headrace.inference.v1 import inference_pb2

from libs.routes import RouteTable
from services.inference.backends.pool import Backends, Lease
from services.inference.domain import ChatCall
from services.inference.tensors.retry import Retrier


class TokenCounter:
    """Counts tokens. Nothing is generated, so nothing is billed."""

    def __init__(self, *, routes: Callable[[], RouteTable], backends: Backends) -> None:
        self._routes = routes
        self._retrier = Retrier(backends)

    async def count(self, call: ChatCall) -> inference_pb2.CountTokensResponse:
        """Returns how many tokens the prompt of a call has.

        Raises:
            HeadraceError: see `InferenceService.CountTokens`.
        """
        call.check()
        choice = self._routes().choose(call.model, kind=model_pb2.MODEL_KIND_CHAT)

        async def attempt(lease: Lease) -> int:
            return await lease.triton.count_tokens(
                lease.target.model, call.turns, deadline_seconds=call.deadline_seconds
            )

        return inference_pb2.CountTokensResponse(
            prompt_tokens=await self._retrier.run(choice, attempt),
            model_version=choice.target.model_version,
            artifact_digest=choice.target.artifact_digest,
        )
