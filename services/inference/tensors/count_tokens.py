"""The number of tokens of a conversation, counted by the model that would answer it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from headrace.common.v1 import model_pb2

from libs.chat.request import GenerationRequest
from libs.errors import InvalidArgument
from libs.routes import Choice, RouteTable
from libs.rpc.identity import Identity
from services.inference.admission import Admission
from services.inference.backends.pool import Backends, Lease
from services.inference.domain import Route
from services.inference.routing import route_of
from services.inference.slots import Demand
from services.inference.tensors.retry import Retrier
from services.inference.work import chat_work, check_prompt, prompt_bytes


@dataclass(frozen=True)
class TokenCount:
    """How many tokens a prompt has, and which version counted them."""

    prompt_tokens: int
    route: Route


class TokenCounter:
    """Counts tokens. Nothing is generated, so nothing is billed.

    Counts wait in queues of their own: they need no slot of those that generate.
    """

    def __init__(
        self, *, routes: Callable[[], RouteTable], backends: Backends, admission: Admission
    ) -> None:
        self._routes = routes
        self._retrier = Retrier(backends)
        self._admission = admission

    async def count(
        self,
        request: GenerationRequest,
        identity: Identity,
        *,
        deadline_seconds: float | None = None,
    ) -> TokenCount:
        """Returns how many tokens the prompt of a request has.

        Args:
            request: only its model and its messages matter.
            identity: who asks.
            deadline_seconds: the caller's deadline, on the clock's monotonic time.

        Raises:
            HeadraceError: see `InferenceService.CountTokens`.
        """
        if wrong := request.violations():
            raise InvalidArgument.of_fields(wrong)
        choice = self._routes().choose(request.model, kind=model_pb2.MODEL_KIND_CHAT)
        size_bytes = check_prompt(request, choice.target.schema)
        demand = Demand(
            tenant=identity.tenant,
            work=chat_work(size_bytes, 1),
            size_bytes=size_bytes,
            deadline_seconds=deadline_seconds,
        )
        return TokenCount(await self._count(choice, request, demand), route_of(choice))

    async def count_unfinished(
        self, choice: Choice, request: GenerationRequest, tenant: str
    ) -> int:
        """Returns the tokens of a prompt whose answer has no end, to bill them.

        Raises:
            HeadraceError: no backend counts them.
        """
        # Not refused: the recorder limits how many there are.
        work = chat_work(prompt_bytes(request), 1)
        return await self._count(choice, request, Demand(tenant, work=work, is_part=True))

    async def _count(self, choice: Choice, request: GenerationRequest, demand: Demand) -> int:
        async def attempt(lease: Lease) -> int:
            return await lease.triton.count_tokens(
                lease.target.model, request.messages, deadline_seconds=demand.deadline_seconds
            )

        async with self._admission.slot(choice.target, demand, counting=True):
            return await self._retrier.run(choice, attempt)
