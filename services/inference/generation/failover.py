"""One answer over as many backends as it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import structlog
from headrace.common.v1.model_pb2 import MODEL_KIND_CHAT
from headrace.router.v1.router_pb2 import RouteTarget
from opentelemetry import trace

from libs.clock import Clock
from libs.errors import HeadraceError
from libs.routes import Choice, RouteTable
from libs.rpc.identity import Identity
from libs.telemetry.tracing import child_span
from services.inference import metrics
from services.inference.backends.pool import Backends, Lease
from services.inference.backends.targets import Protocol
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
from services.inference.generation.relay import ChunkSink

_log = structlog.get_logger()
_tracer = trace.get_tracer("headrace.inference")

# A backend that is back within this time is waited for, and the stream goes on there.
FAILOVER_WAIT_SECONDS = 15.0
FAILOVER_POLL_SECONDS = 0.1


@dataclass
class Run:
    """What is known of a running answer."""

    call: ChatCall
    identity: Identity
    choice: Choice
    max_tokens: int
    started_seconds: float
    fallbacks: tuple[RouteTarget, ...] = ()
    fell_back: bool = False
    delivered: Delivered = field(default_factory=Delivered)
    first_seconds: float | None = None
    ending: Finish | None = None
    resumed_count: int = 0
    recomputed_tokens: int = 0


class Failover:
    """Runs attempts until one ends the answer; the reader sees one unbroken text."""

    def __init__(
        self,
        *,
        backends: Backends,
        routes: Callable[[], RouteTable],
        hedge: HedgeLimits,
        clock: Clock,
    ) -> None:
        self._backends = backends
        self._routes = routes
        self._hedge = hedge
        self._hedges = HedgeBudget(hedge)
        self._clock = clock

    async def run(self, run: Run, relay: ChunkSink) -> None:
        """Puts the whole answer into the relay.

        Raises:
            HeadraceError: no backend ended it.
            DeploymentFailedError: nothing was delivered, and the run has fallbacks.
        """
        failures: Counter[str] = Counter()
        progress, give_up_seconds = -1, 0.0
        self._hedges.count_request()
        while True:
            try:
                run.ending = await self._attempt(run, relay, failures.keys())
            except BackendFailedError as error:
                failure = error
            else:
                return
            failures.update(failure.backends)
            if run.delivered.token_count > progress:  # it came further: the time starts anew
                progress = run.delivered.token_count
                give_up_seconds = self._clock.monotonic_seconds() + FAILOVER_WAIT_SECONDS
                _count_resume(run)
            await self._next_choice(run, failures, give_up_seconds, failure)

    async def _attempt(self, run: Run, relay: ChunkSink, failed: Collection[str]) -> Finish:
        def begin(lane: HedgeAttempt) -> None:
            run.delivered = lane.delivered

        race = HedgedCall(relay, on_begin=begin)
        if not self._hedge.after_seconds or run.delivered.token_count:
            return await self._generate(run, race, avoid=failed, delivered=run.delivered)

        def may_hedge() -> bool:
            others = {backend.id for backend in run.choice.target.backends}
            return bool(others - {lane.backend for lane in race.lanes}) and self._hedges.take()

        ending = await race.run(
            lambda: self._generate(
                run,
                race,
                avoid={*failed, *(lane.backend for lane in race.lanes)},
                delivered=Delivered(),
            ),
            after_seconds=self._hedge.after_seconds,
            may_hedge=may_hedge,
        )
        if len(race.lanes) > 1:
            first = "first" if race.winner is race.lanes[0] else "second"
            metrics.HEDGED_REQUESTS.labels(run.choice.model, first).inc()
        return ending

    async def _generate(
        self, run: Run, race: HedgedCall, *, avoid: Collection[str], delivered: Delivered
    ) -> Finish:
        with self._backends.lease(run.choice.target.backends, avoid=avoid) as lease:
            backend = lease.backend
            lane = race.lane(backend=backend.id, delivered=delivered, works=lease.report_success)
            with _span(lease, delivered):
                try:
                    return await lease.chat.generate(
                        lease.target.model,
                        run.call,
                        max_tokens=run.max_tokens,
                        delivered=delivered,
                        relay=lane,
                    )
                except BackendFailedError as error:
                    metrics.BACKEND_FAILURES.labels(run.choice.model, backend.id).inc()
                    _log.warning("backend failed", backend=backend.id, error=str(error))
                    raise

    async def _next_choice(
        self,
        run: Run,
        failures: Counter[str],
        give_up_seconds: float,
        failure: BackendFailedError,
    ) -> None:
        """Waits until a backend has the same version again, one that has not failed at best.

        Raises:
            HeadraceError: none was back in time, or none can help.
        """
        backends = run.choice.target.backends
        if run.fallbacks and not run.delivered.token_count:
            # One that failed again was asked because no other was willing.
            if all(failures[each.id] for each in backends) or max(failures.values()) > 1:
                raise DeploymentFailedError(failure.told.error(failures)) from failure
            return
        version = run.choice.target.model_version
        while failure.resumable and self._clock.monotonic_seconds() < give_up_seconds:
            try:
                choice = self._routes().choose(version, kind=MODEL_KIND_CHAT)
                run.choice = choice._replace(reason=run.choice.reason)
            except HeadraceError:
                await self._clock.sleep(FAILOVER_POLL_SECONDS)
                continue
            tried = [failures[backend.id] for backend in run.choice.target.backends]
            if failure.attempts is not None and min(tried) >= failure.attempts:
                break
            if min(tried):  # all have failed: one that fails again is asked less often
                await self._clock.sleep(FAILOVER_POLL_SECONDS * min(tried))
            return
        raise failure.told.error(failures) from failure


def _count_resume(run: Run) -> None:
    if run.delivered.token_count:
        run.resumed_count += 1
        run.recomputed_tokens += run.delivered.token_count
        metrics.RESUMED_STREAMS.labels(run.choice.model).inc()


def _span(lease: Lease, delivered: Delivered) -> AbstractContextManager[trace.Span]:
    is_provider = lease.target.endpoint.protocol is Protocol.OPENAI
    return child_span(
        _tracer,
        "openai chat completion" if is_provider else "triton ModelStreamInfer",
        kind=trace.SpanKind.CLIENT,
        attributes={
            "headrace.backend": lease.backend.id,
            "headrace.resumed_tokens": delivered.token_count,
        },
    )
