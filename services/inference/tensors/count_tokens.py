"""The tokens of a conversation, counted by the model that would answer it."""

from __future__ import annotations

import json

from headrace.common.v1 import model_pb2
from headrace.inference.v1 import inference_pb2

from libs.routes import EMPTY, RouteTable
from services.inference.backends.pool import Backends, Lease
from services.inference.backends.triton import count_request
from services.inference.domain import BackendFailedError, ChatCall
from services.inference.tensors import calls
from services.inference.tensors.codec import StreamedResponse
from services.inference.tensors.retry import Retrier


class TokenCounter:
    """Counts without generating, so that nothing is billed."""

    def __init__(self, *, backends: Backends) -> None:
        self._attempts = Retrier(backends)
        self.routes: RouteTable = EMPTY

    async def count(self, call: ChatCall) -> inference_pb2.CountTokensResponse:
        """Returns how many tokens the prompt of a call has.

        Raises:
            HeadraceError: see `InferenceService.CountTokens`.
        """
        call.check()
        choice = self.routes.choose(call.model, kind=model_pb2.MODEL_KIND_CHAT)

        async def attempt(lease: Lease) -> int:
            counts: list[int] = []

            async def take(_message: bytes, streamed: StreamedResponse) -> None:
                if streamed.answered.final:
                    counts.append(int(json.loads(streamed.answered.final)["prompt_tokens"]))

            request = count_request(lease.backend.backend_model, call.turns)
            await calls.stream(lease.triton, request, request_id="", take=take)
            if not counts:
                raise BackendFailedError("the stream ended without a count")
            return counts[0]

        return inference_pb2.CountTokensResponse(
            prompt_tokens=await self._attempts.run(choice, attempt),
            model_version=choice.target.model_version,
            artifact_digest=choice.target.artifact_digest,
        )
