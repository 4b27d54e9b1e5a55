"""An answer from the first of a model's deployments that can give one."""

from __future__ import annotations

import structlog
from headrace.router.v1.router_internal_pb2 import RouteTarget

from libs.errors import ResourceExhausted
from libs.routes import Choice
from services.inference import metrics
from services.inference.admission import Admission
from services.inference.backends.chat import ChunkSink
from services.inference.domain import ChatCall, DeploymentFailedError
from services.inference.generation.failover import DeploymentCall, Failover
from services.inference.slots import Demand
from services.inference.work import chat_work, check_prompt

_log = structlog.get_logger()


class FallbackCall:
    """One answer. Before its first token, another deployment may take over.

    If all deployments fail, the first one is called again; its backends are then waited for.

    Attributes:
        current: the call of the deployment that answers now; set by this class only.
    """

    def __init__(
        self,
        call: ChatCall,
        choice: Choice,
        *,
        tenant: str,
        failover: Failover,
        admission: Admission,
    ) -> None:
        """Makes the call of the chosen deployment.

        Raises:
            InvalidArgument: the request wants more tokens than the model generates, or its prompt
                cannot fit.
        """
        self._prompt_bytes = check_prompt(call.request, choice.target.schema)
        self._tenant = tenant
        self._call = call
        self._first = choice
        self._failover = failover
        self._admission = admission
        self._fallbacks = _fallbacks(call, choice)
        self._on_fallback = False
        self.current: DeploymentCall = self._call_of(choice)

    @property
    def can_fall_back(self) -> bool:
        """Whether another deployment may still answer."""
        return bool(self._fallbacks)

    async def run(self, sink: ChunkSink) -> None:
        """Puts the complete answer into the sink.

        Raises:
            HeadraceError: no deployment completed it.
        """
        while True:
            try:
                return await self._admitted(sink)
            except DeploymentFailedError as failed:
                _log.warning("fallback", model=self._first.model, because=failed.error.message)
                self._next()

    async def _admitted(self, sink: ChunkSink) -> None:
        """Holds a slot for as long as backends work, however slowly the reader reads."""
        current = self.current
        demand = Demand(
            tenant=self._tenant,
            work=chat_work(self._prompt_bytes, current.max_tokens),
            size_bytes=self._prompt_bytes,
            priority=self._call.request.priority,
            deadline_seconds=self._call.deadline_seconds,
        )
        try:
            async with self._admission.slot(current.choice.target, demand):
                await current.run(sink)
        except ResourceExhausted as busy:
            # The caller did not ask for this deployment: it must not see that it is busy.
            if self._on_fallback and not current.delivered.token_count:
                raise DeploymentFailedError(busy) from busy
            raise

    def _next(self) -> None:
        target, *others = self._fallbacks
        failed_version = self.current.choice.target.model_version
        self._fallbacks = tuple(others)
        self._on_fallback = bool(others)
        choice = self._first
        if others:
            reason = f"fallback: the backends of {failed_version} failed"
            choice = self._first._replace(target=target, reason=reason)
            metrics.FALLBACKS.labels(self._first.model).inc()
        self.current = self._call_of(choice)

    def _call_of(self, choice: Choice) -> DeploymentCall:
        return self._failover.call(self._call, choice, has_fallback=bool(self._fallbacks))


def _fallbacks(call: ChatCall, choice: Choice) -> tuple[RouteTarget, ...]:
    """Returns the deployments to call after the first one; the first one again is the last."""
    if call.request.resume_point:  # another version would not continue the text of this one
        return ()
    wanted = call.request.max_tokens or 1
    others = [t for t in choice.fallbacks if t.schema.max_output_tokens >= wanted]
    return (*others, choice.target) if others else ()
