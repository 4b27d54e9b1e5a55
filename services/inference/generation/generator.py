"""One answer, from route to bill."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import structlog
from headrace.common.v1 import model_pb2
from headrace.inference.v1 import inference_pb2
from headrace.router.v1.router_pb2 import RouteTarget

from libs.clock import Clock
from libs.errors import ResourceExhausted
from libs.routes import EMPTY, Choice, RouteTable
from libs.rpc.identity import Identity
from libs.telemetry.tracing import current_trace_id
from services.inference import metrics
from services.inference.accounting import Outcome, Recorder
from services.inference.admission import Admission, slots_of
from services.inference.backends.pool import Backends
from services.inference.domain import ChatCall, Chunk, DeploymentFailedError, Finish
from services.inference.generation.failover import Failover, Run
from services.inference.generation.hedging import HedgeLimits
from services.inference.generation.relay import (
    READER_TOO_SLOW,
    ChunkSink,
    Collector,
    Relay,
    RelayLimits,
    SkipDelivered,
    merged,
)

_log = structlog.get_logger()

Deliver = Callable[[Chunk], Awaitable[None]]


class Generator:
    """Answers chat calls: relays an answer, whichever backends it takes, and bills it."""

    def __init__(
        self,
        *,
        backends: Backends,
        recorder: Recorder,
        hedge: HedgeLimits,
        relay: RelayLimits,
        clock: Clock,
    ) -> None:
        self._recorder = recorder
        self._relay_limits = relay
        self._clock = clock
        self.routes: RouteTable = EMPTY
        self.admission = Admission(clock)
        self._failover = Failover(
            backends=backends, routes=lambda: self.routes, hedge=hedge, clock=clock
        )

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
            fallbacks=_fallbacks(call, choice),
        )
        with metrics.LIVE_STREAMS.track_inprogress():
            try:
                await self._run(run, deliver)
            except BaseException as error:
                self._recorder.record_later(self._outcome(run, error))
                raise
        outcome = self._outcome(run, None)
        cost_nano_usd = await self._recorder.record(outcome)
        return _final(run, outcome.usage, cost_nano_usd)

    async def _run(self, run: Run, deliver: Deliver) -> None:
        """Runs the answer on the chosen deployment, or on the next one that its name stands for.

        Where all of them have failed, it is the first one's again, which is then waited for.
        """
        first = run.choice
        while True:
            try:
                return await self._relay(run, deliver)
            except DeploymentFailedError as failed:
                _log.warning("fallback", model=run.choice.model, because=failed.error.message)
                target, *others = run.fallbacks
                run.fallbacks = tuple(others)
                run.max_tokens = run.call.limited_to(target.schema.max_output_tokens)
                failed_version = run.choice.target.model_version
                run.fell_back = bool(others)
                if not others:
                    run.choice = first
                    continue
                reason = f"fallback: the backends of {failed_version} failed"
                run.choice = first._replace(target=target, reason=reason)
                metrics.FALLBACKS.labels(first.model).inc()

    async def _work(self, run: Run, sink: ChunkSink) -> None:
        """Holds a slot for as long as the backends work, whatever the reader does."""
        queue = self.admission.queue(run.choice.target.deployment)
        try:
            async with queue.slot(
                slots=slots_of(run.choice.target),
                deadline_seconds=run.call.deadline_seconds,
                priority=run.call.priority,
            ):
                await self._failover.run(run, sink)
        except ResourceExhausted as busy:
            # The caller asked for the first deployment; that a fallback is busy is not its matter.
            if run.fallbacks and run.fell_back and not run.delivered.token_count:
                raise DeploymentFailedError(busy) from busy
            raise

    async def _relay(self, run: Run, deliver: Deliver) -> None:
        if not run.call.streamed:
            await self._relay_whole(run, deliver)
            return
        relay = Relay(self._relay_limits)
        skipped = run.call.resume_from
        sink = SkipDelivered(relay, token_count=skipped) if skipped else relay
        async with _filled(relay, self._work(run, sink)):
            while (piece := await relay.take()) is not None:
                if run.first_seconds is None:
                    run.first_seconds = self._clock.monotonic_seconds()
                if piece.text:
                    await deliver(piece)

    async def _relay_whole(self, run: Run, deliver: Deliver) -> None:
        """Nobody reads while the engine writes: no task and no buffer are needed between them."""

        def first() -> None:
            run.first_seconds = self._clock.monotonic_seconds()

        whole = Collector(on_first=first)
        await self._work(run, whole)
        if whole.pieces:
            await deliver(merged(whole.pieces))

    def _outcome(self, run: Run, error: BaseException | None) -> Outcome:
        ending = run.ending or Finish("", 0, run.delivered.token_count, 0)
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


@asynccontextmanager
async def _filled(relay: Relay, work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs what fills a relay beside the block that reads it; raises what ended it early."""
    reader = asyncio.current_task()
    assert reader is not None  # noqa: S101  # a coroutine runs in a task
    source = asyncio.create_task(work)

    def ended(_: asyncio.Task[None]) -> None:
        relay.close()
        if _too_slow(source):  # the reader waits for room to write, perhaps for ever
            reader.cancel()

    source.add_done_callback(ended)
    try:
        yield
        await source
    except asyncio.CancelledError:
        if (error := _too_slow(source)) is None or reader.uncancel():
            raise
        raise error from None
    finally:
        if not source.done():
            source.cancel()
            await asyncio.gather(source, return_exceptions=True)


def _too_slow(source: asyncio.Task[None]) -> ResourceExhausted | None:
    """Returns the error of a source that ended because nobody took what it had."""
    error = source.exception() if source.done() and not source.cancelled() else None
    if isinstance(error, ResourceExhausted) and error.reason == READER_TOO_SLOW:
        return error
    return None


def _fallbacks(call: ChatCall, choice: Choice) -> tuple[RouteTarget, ...]:
    """Returns who may answer after the first one, which is the last resort, too."""
    if call.resume_from:  # another version would not go on with the text that came before
        return ()
    wanted = call.max_tokens or 1
    others = [t for t in choice.fallbacks if t.schema.max_output_tokens >= wanted]
    return (*others, choice.target) if others else ()


def _usage(run: Run) -> model_pb2.TokenUsage:
    """Returns what the client pays: tokens that were computed again after a failure are ours."""
    ending = run.ending
    return model_pb2.TokenUsage(
        prompt_tokens=ending.prompt_tokens if ending else 0,
        completion_tokens=max(0, run.delivered.token_count - run.call.resume_from),
        cached_tokens=ending.cached_tokens if ending else 0,
    )


def _final(run: Run, usage: model_pb2.TokenUsage, cost_nano_usd: int) -> inference_pb2.Final:
    assert run.ending is not None  # noqa: S101  # `answer` comes here only after the end
    first = run.first_seconds or run.started_seconds
    target = run.choice.target
    return inference_pb2.Final(
        finish_reason=run.ending.finish_reason,
        usage=usage,
        cost_nano_usd=cost_nano_usd,
        model_version=target.model_version,
        artifact_digest=target.artifact_digest,
        route=inference_pb2.RouteDecision(deployment=target.deployment, reason=run.choice.reason),
        request_id=run.call.request_id,
        trace_id=current_trace_id(),
        time_to_first_token_ms=round((first - run.started_seconds) * 1000),
        resumed_count=run.resumed_count,
        recomputed_tokens=run.recomputed_tokens + run.resumed_count * run.ending.prompt_tokens,
    )
