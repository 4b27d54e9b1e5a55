"""One answer, from route to bill."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from libs.clock import Clock
from libs.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted
from libs.routes import RouteTable
from libs.rpc.identity import Identity
from libs.telemetry.tracing import current_trace_id
from services.inference import metrics
from services.inference.accounting import Outcome, PromptCounter, Recorder, UncountedPrompt
from services.inference.admission import Admission
from services.inference.backends.pool import Backends
from services.inference.cache_salts import CacheSalts
from services.inference.domain import (
    ChatCall,
    Chunk,
    Finish,
    GenerationResult,
    Started,
    TokenUsage,
)
from services.inference.generation.failover import DeploymentCall, Failover
from services.inference.generation.fallback import FallbackCall
from services.inference.generation.hedging import HedgeLimits
from services.inference.generation.relay import (
    READER_TOO_SLOW,
    Collector,
    Relay,
    RelayLimits,
    SkipDelivered,
    merged,
)
from services.inference.routing import choose_chat, counts_tokens, route_of
from services.inference.work import prompt_bytes

# Sends a chunk to the client and returns when the next one may be sent. The first call also has the
# start of the answer; its chunk is empty if there is none yet.
Deliver = Callable[[Chunk, Started | None], Awaitable[None]]

# A client waits for so long at most until it gets the start of its answer, if no other version can
# take over any more. Usually the first chunk comes earlier, and the start is sent with it.
START_SECONDS = 1.0


class Generator:
    """Answers chat calls: runs them on backends, relays their chunks and records their usage."""

    def __init__(
        self,
        *,
        routes: Callable[[], RouteTable],
        backends: Backends,
        admission: Admission,
        recorder: Recorder,
        hedge: HedgeLimits,
        relay: RelayLimits,
        cache_salts: CacheSalts,
        count_prompt: PromptCounter,
        clock: Clock,
    ) -> None:
        self._routes = routes
        self._cache_salts = cache_salts
        self._admission = admission
        self._recorder = recorder
        self._relay_limits = relay
        self._count_prompt = count_prompt
        self._clock = clock
        self._failover = Failover(backends=backends, routes=routes, hedge=hedge, clock=clock)

    async def answer(
        self, call: ChatCall, identity: Identity, deliver: Deliver
    ) -> GenerationResult:
        """Delivers the answer chunk by chunk and returns its end, once its usage is durable.

        Raises:
            HeadraceError: see `InferenceService.Generate`. What was generated before is billed.
        """
        call.check()
        call = replace(call, cache_salt=self._cache_salts.of(identity.tenant))
        choice = choose_chat(self._routes(), call.request)
        fallback = FallbackCall(
            call,
            choice,
            tenant=identity.tenant,
            failover=self._failover,
            admission=self._admission,
        )
        generation = _Generation(call, identity, fallback, clock=self._clock)
        with metrics.LIVE_STREAMS.track_inprogress():
            try:
                await generation.run(deliver, self._relay_limits)
            except BaseException as error:
                self._record_unfinished(generation, error)
                raise
        outcome = generation.outcome(None)
        cost_nano_usd = await self._recorder.record(outcome)
        return generation.result(outcome, cost_nano_usd)

    def _record_unfinished(self, generation: _Generation, error: BaseException) -> None:
        """Records an answer without an end: the engine has not reported its tokens."""
        outcome = generation.outcome(error)
        call = generation.call
        prompt = None
        if generation.has_uncounted_prompt(error):
            count = partial(
                self._count_prompt, outcome.choice, call.request, outcome.identity.tenant
            )
            prompt = UncountedPrompt(prompt_bytes(call.request), count)
        self._recorder.record_later(outcome, prompt=prompt)


class _Generation:
    """A running answer: who asked, when its first chunk came, and what the backends did."""

    def __init__(
        self, call: ChatCall, identity: Identity, fallback: FallbackCall, *, clock: Clock
    ) -> None:
        self.call = call
        self._identity = identity
        self._fallback = fallback
        self._clock = clock
        self._started_seconds = clock.monotonic_seconds()
        self._first_seconds: float | None = None

    async def run(self, deliver: Deliver, limits: RelayLimits) -> None:
        """Delivers the complete answer."""
        if not self.call.streamed:
            await self._run_unstreamed(deliver)
            return
        relay = Relay(limits)
        skipped = self.call.request.resumed_tokens
        sink = SkipDelivered(relay, token_count=skipped) if skipped else relay
        timer = asyncio.get_running_loop().call_later(START_SECONDS, relay.wake)
        try:
            async with _filled(relay, self._fallback.run(sink)):
                await self._deliver_start(relay, deliver)
                timer.cancel()
                while (chunk := await relay.take()) is not None:
                    if _has_tokens(chunk):
                        self._note_first()
                        await deliver(chunk, None)
        finally:
            timer.cancel()

    async def _deliver_start(self, relay: Relay, deliver: Deliver) -> None:
        """Returns when the start is delivered, with the first chunk or before it, or at the end."""
        while (chunk := await relay.take()) is not None:
            if _has_tokens(chunk):
                self._note_first()
            elif chunk.finish is None and self._fallback.can_fall_back:
                continue  # another version may still answer
            await deliver(chunk, self._start())
            return

    async def _run_unstreamed(self, deliver: Deliver) -> None:
        """Needs no task and no buffer: nothing is read while the backend writes."""
        collector = Collector(on_first=self._note_first)
        await self._fallback.run(collector)
        if collector.chunks:
            await deliver(merged(collector.chunks), self._start())

    def _start(self) -> Started:
        choice = self._fallback.current.choice
        return Started(
            request_id=self.call.request_id,
            trace_id=current_trace_id(),
            route=route_of(choice),
            is_resumable=self.call.request.is_repeatable and counts_tokens(choice),
        )

    def outcome(self, error: BaseException | None) -> Outcome:
        """Returns what is recorded of the answer, which has ended."""
        current = self._fallback.current
        messages = self.call.request.messages
        return Outcome(
            operation="generate",
            request_id=self.call.request_id,
            identity=self._identity,
            choice=current.choice,
            usage=self._usage(current, error),
            inputs=tuple(text for each in messages for text in (each.role, each.content)),
            started_seconds=self._started_seconds,
            first_seconds=self._first_seconds,
            finish_reason=current.finish.finish_reason if current.finish else "",
            error=error,
        )

    def result(self, outcome: Outcome, cost_nano_usd: int) -> GenerationResult:
        """Returns the end of the answer, which is complete."""
        current = self._fallback.current
        finish = _finish_of(current)
        first_seconds = self._first_seconds or self._started_seconds
        return GenerationResult(
            request_id=self.call.request_id,
            trace_id=current_trace_id(),
            route=route_of(current.choice),
            finish_reason=finish.finish_reason,
            usage=outcome.usage,
            cost_nano_usd=cost_nano_usd,
            first_token_seconds=first_seconds - self._started_seconds,
            resumed_count=current.resumed_count,
            recomputed_tokens=current.recomputed_tokens
            + current.resumed_count * finish.prompt_tokens,
        )

    def has_uncounted_prompt(self, error: BaseException) -> bool:
        """Returns whether an engine has read the prompt, and was stopped because of the caller."""
        current = self._fallback.current
        if current.finish or not current.was_started or not counts_tokens(current.choice):
            return False
        if isinstance(error, asyncio.CancelledError | ConnectionError):
            return True
        return bool(current.delivered.token_count) and _is_callers(error)

    def _usage(self, current: DeploymentCall, error: BaseException | None) -> TokenUsage:
        """Returns what the client pays for: not what was computed again after a failure.

        Nor does it pay again for the tokens before the position at which it resumes, if the answer
        reaches it. If it left before, or the position is wrong, it pays for what was generated.
        """
        finish = current.finish
        generated = current.delivered.token_count
        delivered = generated - self.call.request.resumed_tokens
        if delivered < 0 and error is not None and _is_callers(error):
            delivered = generated
        return TokenUsage(
            prompt_tokens=finish.prompt_tokens if finish else 0,
            completion_tokens=max(0, delivered),
            cached_tokens=finish.cached_tokens if finish else 0,
        )

    def _note_first(self) -> None:
        if self._first_seconds is None:
            self._first_seconds = self._clock.monotonic_seconds()


def _is_callers(error: BaseException) -> bool:
    """Returns whether an answer ended because of its caller, not because of a backend."""
    kinds = (
        asyncio.CancelledError,
        ConnectionError,
        DeadlineExceeded,
        InvalidArgument,
        ResourceExhausted,
    )
    return isinstance(error, kinds)


def _has_tokens(chunk: Chunk) -> bool:
    return bool(chunk.text or chunk.token_count)


def _finish_of(call: DeploymentCall) -> Finish:
    assert call.finish is not None  # noqa: S101  # `run` returned: the answer is complete
    return call.finish


@asynccontextmanager
async def _filled(relay: Relay, work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs what fills a relay while the block reads it; raises the error that ended it early."""
    reader = asyncio.current_task()
    assert reader is not None  # noqa: S101  # a coroutine runs in a task
    source = asyncio.create_task(work)

    def ended(_: asyncio.Task[None]) -> None:
        relay.close()
        if _too_slow(source):  # the reader may wait forever until it can write
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
    """Returns the error of a source that ended because its chunks were not read."""
    error = source.exception() if source.done() and not source.cancelled() else None
    if isinstance(error, ResourceExhausted) and error.reason == READER_TOO_SLOW:
        return error
    return None
