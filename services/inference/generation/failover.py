"""An answer from the backends of one deployment, as many as it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager

import structlog
from headrace.common.v1.model_pb2 import MODEL_KIND_CHAT
from opentelemetry import trace

from libs.clock import Clock
from libs.errors import HeadraceError
from libs.routes import Choice, RouteTable
from libs.telemetry.tracing import child_span
from services.inference import metrics
from services.inference.backends.chat import ChunkSink
from services.inference.backends.pool import Backends, Lease, Suspects
from services.inference.backends.targets import Protocol
from services.inference.deadlines import deadline_exceeded, seconds_left
from services.inference.domain import (
    BackendFailedError,
    ChatCall,
    Delivered,
    DeploymentFailedError,
    Finish,
)
from services.inference.generation.hedging import (
    HedgeAttempt,
    HedgeBudget,
    HedgedCall,
    HedgeLimits,
)

_log = structlog.get_logger()
_tracer = trace.get_tracer("headrace.inference")

# If no backend is left, one is waited for so long; the answer then continues there.
FAILOVER_WAIT_SECONDS = 15.0
FAILOVER_POLL_SECONDS = 0.1


class Failover:
    """Makes the calls to deployments, and holds what they share."""

    def __init__(
        self,
        *,
        backends: Backends,
        routes: Callable[[], RouteTable],
        hedge: HedgeLimits,
        clock: Clock,
    ) -> None:
        self.backends = backends
        self.routes = routes
        self.hedge = hedge
        self.hedge_budget = HedgeBudget(hedge)
        self.clock = clock

    def call(self, call: ChatCall, choice: Choice, *, has_fallback: bool) -> DeploymentCall:
        """Returns the call of a deployment.

        Args:
            call: the request.
            choice: the deployment.
            has_fallback: whether another deployment can answer if all backends of this one fail.

        Raises:
            InvalidArgument: the request wants more tokens than the model generates.
        """
        max_tokens = call.max_tokens_for(choice.target.schema.max_output_tokens)
        return DeploymentCall(self, call, choice, max_tokens=max_tokens, has_fallback=has_fallback)


class DeploymentCall:
    """One answer from one deployment; the reader sees one unbroken text.

    Only this class sets its attributes; they are valid during `run` and after it, however it ends.

    Attributes:
        max_tokens: how long the answer may be.
        was_started: the request was sent to a backend.
        choice: where the answer comes from; after a failover the same version, perhaps elsewhere.
        delivered: what was put into the sink.
        finish: how the engine ended the answer; None: it did not.
        resumed_count: how often another backend continued the answer.
        recomputed_tokens: of the answer, processed again because of that.
    """

    def __init__(
        self,
        shared: Failover,
        call: ChatCall,
        choice: Choice,
        *,
        max_tokens: int,
        has_fallback: bool,
    ) -> None:
        self.choice = choice
        self.delivered = Delivered()
        self.finish: Finish | None = None
        self.resumed_count = 0
        self.recomputed_tokens = 0
        self._shared = shared
        self.max_tokens = max_tokens
        self.was_started = False
        self._call = call
        self._has_fallback = has_fallback
        self._failures: Counter[str] = Counter()
        self._suspects = Suspects()

    async def run(self, sink: ChunkSink) -> None:
        """Puts the complete answer into the sink.

        Raises:
            HeadraceError: no backend completed it.
            DeploymentFailedError: nothing was delivered, and there is a fallback.
        """
        progress, give_up_seconds = -1, 0.0
        self._shared.hedge_budget.count_request()
        while True:
            try:
                self.finish = await self._attempt(sink)
            except BackendFailedError as error:
                failure = error
            else:
                return
            self._failures.update(failure.backends)
            if self.delivered.token_count > progress:  # there was progress: the time starts again
                progress = self.delivered.token_count
                give_up_seconds = self._shared.clock.monotonic_seconds() + FAILOVER_WAIT_SECONDS
                self._count_resume()
            await self._next_choice(failure, give_up_seconds)

    async def _attempt(self, sink: ChunkSink) -> Finish:
        def take_over(winner: HedgeAttempt) -> None:
            self.delivered = winner.delivered

        hedged, limits = HedgedCall(sink, on_winner=take_over), self._shared.hedge
        if not limits.after_seconds or self.delivered.token_count:
            return await self._generate(hedged, avoid=self._failures, delivered=self.delivered)

        def may_hedge() -> bool:
            others = {backend.status.id for backend in self.choice.target.backends}
            others -= {attempt.backend for attempt in hedged.attempts}
            return bool(others) and self._shared.hedge_budget.take()

        finish = await hedged.run(
            lambda: self._generate(
                hedged,
                avoid={*self._failures, *(attempt.backend for attempt in hedged.attempts)},
                delivered=Delivered(),
            ),
            after_seconds=limits.after_seconds,
            may_hedge=may_hedge,
        )
        if len(hedged.attempts) > 1:
            first = "first" if hedged.winner is hedged.attempts[0] else "second"
            metrics.HEDGED_REQUESTS.labels(self.choice.model, first).inc()
        return finish

    async def _generate(
        self, hedged: HedgedCall, *, avoid: Collection[str], delivered: Delivered
    ) -> Finish:
        with self._shared.backends.lease(self.choice.target.backends, avoid=avoid) as lease:
            backend = lease.backend
            self.was_started = True
            sink = hedged.attempt(
                backend=backend.status.id, delivered=delivered, on_first=lease.report_success
            )
            with _span(lease, delivered):
                try:
                    finish = await lease.chat.generate(
                        lease.target.model,
                        self._call,
                        max_tokens=self.max_tokens,
                        delivered=delivered,
                        relay=sink,
                    )
                except BackendFailedError as error:
                    metrics.count_failure(self.choice.model, backend.status.id, error.fault)
                    _log.warning(
                        "backend failed",
                        backend=backend.status.id,
                        request_id=self._call.request_id,
                        fault=error.fault.value,
                        error=str(error),
                    )
                    self._suspects.note(lease, error)
                    raise
            self._suspects.answered_by(lease)
            return finish

    async def _next_choice(self, failure: BackendFailedError, give_up_seconds: float) -> None:
        """Waits until a backend has the same version, preferably one that has not failed.

        Raises:
            HeadraceError: there was none in time, or none can continue.
        """
        failures, clock = self._failures, self._shared.clock
        error = failure.client_error.to_error(failures, request_id=self._call.request_id)
        if self._has_fallback and not self.delivered.token_count:
            # A backend that failed twice was retried because no other one was available.
            tried_all = all(failures[backend.status.id] for backend in self.choice.target.backends)
            if tried_all or max(failures.values()) > 1 or self._suspects.are_enough:
                raise DeploymentFailedError(error) from failure
            return
        if self._suspects.are_enough:
            raise error from failure
        version = self.choice.target.model_version
        while failure.resumable and clock.monotonic_seconds() < give_up_seconds:
            try:
                choice = self._shared.routes().choose(version, kind=MODEL_KIND_CHAT)
                self.choice = choice._replace(reason=self.choice.reason)
            except HeadraceError:  # not ready anywhere now, perhaps soon
                await self._pause(FAILOVER_POLL_SECONDS)
                continue
            tried = [failures[backend.status.id] for backend in self.choice.target.backends]
            if failure.attempts is not None and min(tried) >= failure.attempts:
                break
            if min(tried):  # all have failed: retry more slowly after each failure
                await self._pause(FAILOVER_POLL_SECONDS * min(tried))
            return
        raise error from failure

    async def _pause(self, seconds: float) -> None:
        """Waits for a backend, at most until the caller's deadline.

        Raises:
            DeadlineExceeded: it passed.
        """
        clock, deadline_seconds = self._shared.clock, self._call.deadline_seconds
        left = seconds_left(deadline_seconds, clock, waiting_for="backend")
        await clock.sleep(seconds if left is None else min(left, seconds))
        if left is not None and left <= seconds:
            raise deadline_exceeded("backend")

    def _count_resume(self) -> None:
        if self.delivered.token_count:
            self.resumed_count += 1
            self.recomputed_tokens += self.delivered.token_count
            metrics.RESUMED_STREAMS.labels(self.choice.model).inc()


def _span(lease: Lease, delivered: Delivered) -> AbstractContextManager[trace.Span]:
    is_provider = lease.target.endpoint.protocol is Protocol.OPENAI
    return child_span(
        _tracer,
        "openai chat completion" if is_provider else "triton ModelStreamInfer",
        kind=trace.SpanKind.CLIENT,
        attributes={
            "headrace.backend": lease.backend.status.id,
            "headrace.resumed_tokens": delivered.token_count,
        },
    )
