"""One answer, from route to bill."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog
from headrace.common.v1 import model_pb2
from headrace.inference.v1 import inference_pb2
from opentelemetry import trace

from libs.clock import Clock
from libs.errors import HeadraceError, Unavailable
from libs.routes import EMPTY, Choice, RouteTable
from libs.rpc.identity import Identity
from libs.telemetry.tracing import current_trace_id
from services.inference import metrics
from services.inference.backends import Backends
from services.inference.domain import BackendFailedError, ChatCall, Delivered, Ending, Piece
from services.inference.record import Outcome, Recorder
from services.inference.relay import Relay
from services.inference.triton import Triton

_log = structlog.get_logger()
_tracer = trace.get_tracer("headrace.inference")

Deliver = Callable[[Piece], Awaitable[None]]

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
    delivered: Delivered = field(default_factory=Delivered)
    first_seconds: float | None = None
    ending: Ending | None = None
    resumed_count: int = 0


class Generator:
    """Answers chat calls: picks a backend, relays its pieces, replaces it when it dies, bills."""

    def __init__(self, *, backends: Backends, recorder: Recorder, clock: Clock) -> None:
        self._backends = backends
        self._recorder = recorder
        self._clock = clock
        self.routes: RouteTable = EMPTY

    async def answer(
        self, call: ChatCall, identity: Identity, deliver: Deliver
    ) -> inference_pb2.Final:
        """Delivers the answer piece by piece and returns its end, once its usage is durable.

        Raises:
            HeadraceError: see `InferenceService.Generate`. What was generated before is billed.
        """
        call.check()
        choice = self.routes.choose(call.model, kind=model_pb2.MODEL_KIND_CHAT)
        run = Run(
            call=call,
            identity=identity,
            choice=choice,
            max_tokens=call.limited_to(choice.target.schema.max_output_tokens),
            started_seconds=self._clock.monotonic_seconds(),
        )
        with metrics.LIVE_STREAMS.track_inprogress():
            try:
                await self._relay(run, deliver)
            except BaseException as error:
                self._recorder.record_later(self._outcome(run, error))
                raise
        cost_nano_usd = await self._recorder.record(self._outcome(run, None))
        return _final(run, cost_nano_usd)

    async def _relay(self, run: Run, deliver: Deliver) -> None:
        relay = Relay()
        source = asyncio.create_task(self._produce(run, relay))
        source.add_done_callback(lambda _: relay.close())
        try:
            while (piece := await relay.take()) is not None:
                if run.first_seconds is None:
                    run.first_seconds = self._clock.monotonic_seconds()
                if piece.text:
                    await deliver(piece)
            await source  # raises what ended it early
        finally:
            source.cancel()
            await asyncio.gather(source, return_exceptions=True)

    async def _produce(self, run: Run, relay: Relay) -> None:
        """Runs attempts until one ends the answer; the reader sees one unbroken text."""
        failed: frozenset[str] = frozenset()
        progress, give_up_seconds = -1, 0.0
        while run.ending is None:
            if run.delivered.token_count > progress:
                progress = run.delivered.token_count
                give_up_seconds = self._clock.monotonic_seconds() + FAILOVER_WAIT_SECONDS
            with self._backends.lease(run.choice.target.backends, avoid=failed) as lease:
                try:
                    run.ending = await self._attempt(lease.triton, lease.backend, run, relay)
                except BackendFailedError as error:
                    metrics.BACKEND_FAILURES.labels(run.choice.model, lease.backend.id).inc()
                    _log.warning("backend failed", backend=lease.backend.id, error=str(error))
                    failed |= {lease.backend.id}
                    failure = error
                else:
                    return
            await self._next_choice(run, failed, give_up_seconds, failure)
            if run.delivered.token_count:
                run.resumed_count += 1
                metrics.RESUMED_STREAMS.labels(run.choice.model).inc()

    async def _attempt(
        self, triton: Triton, backend: model_pb2.Backend, run: Run, relay: Relay
    ) -> Ending:
        with _tracer.start_as_current_span(
            "triton ModelStreamInfer",
            kind=trace.SpanKind.CLIENT,
            attributes={
                "headrace.backend": backend.id,
                "headrace.resumed_tokens": run.delivered.token_count,
            },
        ):
            return await triton.generate(
                backend.backend_model,
                run.call,
                max_tokens=run.max_tokens,
                delivered=run.delivered,
                relay=relay,
            )

    async def _next_choice(
        self, run: Run, failed: frozenset[str], give_up_seconds: float, cause: BackendFailedError
    ) -> None:
        """Waits until a backend has the same version again, one that has not failed at best.

        Raises:
            Unavailable: none was back in time.
        """
        version = run.choice.target.model_version
        name = version.removeprefix("models/").replace("/versions/", "@")
        while self._clock.monotonic_seconds() < give_up_seconds:
            try:
                run.choice = self.routes.choose(name, kind=model_pb2.MODEL_KIND_CHAT)
            except HeadraceError:
                await self._clock.sleep(FAILOVER_POLL_SECONDS)
                continue
            if all(backend.id in failed for backend in run.choice.target.backends):
                await self._clock.sleep(FAILOVER_POLL_SECONDS)
            return
        raise Unavailable(
            f"the backends of {version} failed",
            reason="BACKEND_FAILED",
            metadata={"backend": ",".join(sorted(failed))},
            retry_after_seconds=1.0,
        ) from cause

    def _outcome(self, run: Run, error: BaseException | None) -> Outcome:
        ending = run.ending or Ending("", 0, run.delivered.token_count, 0)
        return Outcome(
            operation="generate",
            request_id=run.call.request_id,
            identity=run.identity,
            choice=run.choice,
            usage=_usage(run),
            inputs=tuple(text for turn in run.call.turns for text in (turn.role, turn.content)),
            started_seconds=run.started_seconds,
            first_seconds=run.first_seconds,
            finish_reason=ending.finish_reason,
            error=error,
        )


def _usage(run: Run) -> model_pb2.TokenUsage:
    """Returns what the client pays: tokens that were computed again after a failure are ours."""
    ending = run.ending
    return model_pb2.TokenUsage(
        prompt_tokens=ending.prompt_tokens if ending else 0,
        completion_tokens=run.delivered.token_count,
        cached_tokens=ending.cached_tokens if ending else 0,
    )


def _final(run: Run, cost_nano_usd: int) -> inference_pb2.Final:
    assert run.ending is not None  # noqa: S101  # `answer` comes here only after the end
    first = run.first_seconds or run.started_seconds
    target = run.choice.target
    return inference_pb2.Final(
        finish_reason=run.ending.finish_reason,
        usage=_usage(run),
        cost_nano_usd=cost_nano_usd,
        model_version=target.model_version,
        artifact_digest=target.artifact_digest,
        route=inference_pb2.RouteDecision(deployment=target.deployment, reason=run.choice.reason),
        request_id=run.call.request_id,
        trace_id=current_trace_id(),
        time_to_first_token_ms=round((first - run.started_seconds) * 1000),
    )
