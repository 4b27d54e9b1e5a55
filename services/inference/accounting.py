"""The end of a request: its usage event, log line, metrics and span attributes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import structlog
from headrace.common.v1 import model_pb2, usage_pb2
from opentelemetry import trace

from libs.chat.request import GenerationRequest
from libs.clock import Clock
from libs.errors import HeadraceError
from libs.metering.usage import UsageRecorder
from libs.routes import Choice
from libs.rpc.identity import Identity
from libs.shared_limit import SharedLimit
from libs.telemetry import genai
from libs.telemetry.hashing import InputHasher
from services.inference import metrics
from services.inference.domain import TokenUsage
from services.inference.slots import REQUEST_OVERHEAD_BYTES
from services.inference.work import chat_work

_log = structlog.get_logger()

# Prompts to be counted after their callers left, of all tenants together; one alone gets half.
DEFAULT_UNCOUNTED_LIMIT_BYTES = 32 * 1024 * 1024
UNCOUNTED_ALPHA = 1.0

# Returns the tokens of a prompt, of a tenant, that a model has read.
PromptCounter = Callable[[Choice, GenerationRequest, str], Awaitable[int]]

# The operation in metrics and spans is what the model does, whichever API asked for it.
_OPERATIONS = {
    model_pb2.MODEL_KIND_CHAT: genai.OPERATION_CHAT,
    model_pb2.MODEL_KIND_EMBEDDING: genai.OPERATION_EMBEDDINGS,
}


@dataclass(frozen=True)
class UncountedPrompt:
    """A prompt that a model has read without reporting its tokens.

    Attributes:
        size_bytes: its size.
        count: counts its tokens.
    """

    size_bytes: int
    count: Callable[[], Awaitable[int]]


@dataclass(frozen=True)
class Outcome:
    """How a request ended.

    Attributes:
        operation: `generate` or `infer`.
        inputs: hashed for the log.
        started_seconds: on the clock's monotonic time.
        first_seconds: when its first token came; None: none came.
        finish_reason: empty where the engine did not finish the answer.
        is_estimated: the tokens of its prompt are an estimate.
    """

    operation: str
    request_id: str
    identity: Identity
    choice: Choice
    usage: TokenUsage
    inputs: tuple[str | bytes, ...]
    started_seconds: float
    first_seconds: float | None = None
    finish_reason: str = ""
    error: BaseException | None = None
    is_estimated: bool = False


class Recorder:
    """Makes usage durable and reports how requests ended, without their inputs."""

    def __init__(
        self,
        *,
        usage: UsageRecorder,
        hasher: InputHasher,
        clock: Clock,
        uncounted_limit_bytes: int = DEFAULT_UNCOUNTED_LIMIT_BYTES,
    ) -> None:
        """Makes it.

        Args:
            usage: makes usage durable.
            hasher: hashes inputs for the log.
            clock: the time.
            uncounted_limit_bytes: of prompts that are to be counted, of all tenants together. What
                is beyond a tenant's share of it is billed by an estimate.
        """
        self._uncounted = SharedLimit(uncounted_limit_bytes, alpha=UNCOUNTED_ALPHA)
        self._usage = usage
        self._hasher = hasher
        self._clock = clock
        self._pending: set[asyncio.Task[int]] = set()

    async def record(self, outcome: Outcome) -> int:
        """Returns the cost in nano-USD, once the usage is durable. Without usage there is no event.

        Raises:
            Unavailable: the bus did not acknowledge in time.
        """
        cost_nano_usd = 0
        if outcome.usage.prompt_tokens or outcome.usage.completion_tokens:
            cost_nano_usd = await self._usage.record(
                request_id=outcome.request_id,
                identity=outcome.identity,
                model=outcome.choice.model,
                model_version=outcome.choice.target.model_version,
                usage=_to_proto(outcome.usage),
                operation=outcome.operation,
            )
        self._report(outcome, cost_nano_usd)
        return cost_nano_usd

    def record_later(self, outcome: Outcome, *, prompt: UncountedPrompt | None = None) -> None:
        """Records a request whose caller does not wait for it.

        Args:
            outcome: how it ended.
            prompt: its prompt, whose tokens the engine did not report; None: they are in the
                outcome, or no engine has read the prompt.
        """
        # A job is tried again: its usage is recorded when it succeeds, or by its worker when it is
        # cancelled.
        if outcome.identity.usage_id:
            return
        if prompt is None:
            work = self.record(outcome)
        elif self._uncounted.take(outcome.identity.tenant, _held_bytes(prompt)):
            work = self._count_and_record(outcome, prompt)
        else:
            work = self.record(_estimated(outcome, prompt))
        task = asyncio.create_task(work)
        self._pending.add(task)
        task.add_done_callback(self._recorded)

    async def _count_and_record(self, outcome: Outcome, prompt: UncountedPrompt) -> int:
        usage = outcome.usage
        try:
            usage = replace(usage, prompt_tokens=await prompt.count())
        except HeadraceError as error:
            _log.warning("a prompt was not counted, and is not billed", error=error.reason)
        finally:
            self._uncounted.release(outcome.identity.tenant, _held_bytes(prompt))
        return await self.record(replace(outcome, usage=usage))

    async def drain(self) -> None:
        """Returns when all usage is durable."""
        await asyncio.gather(*self._pending, return_exceptions=True)
        await self._usage.drain()

    def _recorded(self, task: asyncio.Task[int]) -> None:
        self._pending.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("usage was not recorded", exc_info=task.exception())

    def _report(self, outcome: Outcome, cost_nano_usd: int) -> None:
        now = self._clock.monotonic_seconds()
        usage, target = outcome.usage, outcome.choice.target
        error = _error_type(outcome.error)
        operation = _OPERATIONS.get(target.schema.kind, genai.OPERATION_CHAT)
        seconds = now - outcome.started_seconds
        first = (
            None
            if outcome.first_seconds is None
            else outcome.first_seconds - outcome.started_seconds
        )
        genai.observe(
            model=outcome.choice.model,
            model_version=target.model_version,
            operation=operation,
            error_type=error,
            duration_seconds=seconds,
            first_token_seconds=first,
            output_tokens=usage.completion_tokens,
        )
        metrics.count_tokens(outcome.choice.model, usage)
        span = trace.get_current_span()
        if span.is_recording():
            span.set_attributes(
                {
                    genai.OPERATION_NAME: operation,
                    genai.REQUEST_MODEL: outcome.choice.model,
                    genai.RESPONSE_MODEL: target.model_version,
                    genai.USAGE_INPUT_TOKENS: usage.prompt_tokens,
                    genai.USAGE_OUTPUT_TOKENS: usage.completion_tokens,
                    "headrace.cost_nano_usd": cost_nano_usd,
                    "headrace.artifact_digest": target.artifact_digest,
                }
            )
        _log.info(
            outcome.operation,
            request_id=outcome.request_id,
            tenant=outcome.identity.tenant,
            user=outcome.identity.user,
            model_version=target.model_version,
            deployment=target.deployment,
            input_hash=self._hasher.hash(*outcome.inputs),
            prompt_tokens=usage.prompt_tokens,
            prompt_tokens_are_estimated=outcome.is_estimated,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            cost_nano_usd=cost_nano_usd,
            finish_reason=outcome.finish_reason,
            error=error,
            time_to_first_token_seconds=None if first is None else round(first, 6),
            duration_seconds=round(seconds, 6),
        )


def _held_bytes(prompt: UncountedPrompt) -> int:
    return prompt.size_bytes + REQUEST_OVERHEAD_BYTES


def _estimated(outcome: Outcome, prompt: UncountedPrompt) -> Outcome:
    """Returns an outcome with about as many prompt tokens as its prompt has, at most a context."""
    metrics.ESTIMATED_PROMPTS.labels(outcome.choice.model).inc()
    tokens = chat_work(prompt.size_bytes, 1)
    if context := outcome.choice.target.schema.context_tokens:
        tokens = min(tokens, context)
    return replace(outcome, usage=replace(outcome.usage, prompt_tokens=tokens), is_estimated=True)


def _to_proto(usage: TokenUsage) -> usage_pb2.TokenUsage:
    return usage_pb2.TokenUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def _error_type(error: BaseException | None) -> str:
    if error is None:
        return ""
    return error.reason if isinstance(error, HeadraceError) else type(error).__name__
