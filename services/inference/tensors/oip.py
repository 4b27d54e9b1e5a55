"""The Open Inference Protocol, with the routes, tenants, versions and bills of this mesh.

Tensors pass through as they are; `codec` reads and renames the messages that carry them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from headrace.common.v1 import model_pb2

from libs.chat.request import MAX_PRIORITY
from libs.clock import Clock
from libs.errors import DeadlineExceeded, InvalidArgument
from libs.ids import check_uuid, uuid7
from libs.routes import EMPTY, Choice, RouteTable
from libs.rpc.channel import MAX_MESSAGE_BYTES
from libs.rpc.identity import Identity
from services.inference import metrics
from services.inference.accounting import Outcome, PromptCounter, Recorder, UncountedPrompt
from services.inference.admission import Admission
from services.inference.backends.pool import Backends, Lease
from services.inference.backends.triton.codec import finish_of, read_final
from services.inference.cache_salts import CacheSalts
from services.inference.deadlines import deadline_exceeded, seconds_left
from services.inference.domain import BackendFailedError, TokenUsage
from services.inference.slots import Demand
from services.inference.tensors import calls, codec
from services.inference.tensors.descriptions import Descriptions, Key
from services.inference.tensors.inputs import check_encoding
from services.inference.tensors.retry import Attempt, Retrier, kind_mismatch
from services.inference.tensors.texts import check_text_sizes, conversation_of
from services.inference.work import max_text_bytes, prompt_bytes, tensor_work

# What gRPC accepts, less what renaming adds.
MAX_TENSOR_REQUEST_BYTES = MAX_MESSAGE_BYTES - 4096
# The hash of an input in the log covers its first bytes and its length: tensors are large.
MAX_HASHED_BYTES = 64 * 1024

# The parameter of a request that Triton reads.
PRIORITY = "priority"

Deliver = Callable[[bytes], Awaitable[None]]


class Caller(NamedTuple):
    """Who calls, and its deadline on the clock's monotonic time, or None."""

    identity: Identity
    deadline_seconds: float | None


@dataclass
class _Run:
    """The state of a running request."""

    message: bytes
    head: codec.InferRequestHead
    caller: Caller
    choice: Choice
    usage_outputs: tuple[str, ...]
    cache_salt: str
    request_id: str
    started_seconds: float
    first_seconds: float | None = None
    finish_reason: str = ""
    usage: TokenUsage = field(default_factory=TokenUsage)
    is_recorded: bool = False
    is_running: bool = False
    is_abandoned: bool = False

    @property
    def kind(self) -> model_pb2.ModelKind.ValueType:
        return self.choice.target.schema.kind

    @property
    def version(self) -> str:
        return version_of(self.choice)

    def request(self, backend_model: str) -> bytes:
        """Returns the message for one backend."""
        requested = self.head.outputs  # none: all
        more = [name for name in self.usage_outputs if requested and name not in requested]
        return codec.renamed_request(
            self.message, backend_model, more_outputs=more, cache_salt=self.cache_salt
        )

    def count(self, tokens: codec.InferResponseTokens) -> bool:
        """Adds the tokens of a message; returns whether it is the end of the answer.

        Raises:
            BackendFailedError: the end is malformed.
        """
        self.usage.completion_tokens += tokens.generated_tokens
        self.usage.prompt_tokens += tokens.input_tokens
        if self.kind != model_pb2.MODEL_KIND_CHAT:
            return tokens.has_outputs
        if not tokens.final:
            return False
        finish = finish_of(read_final(tokens.final))
        if finish is not None:
            self.finish_reason = finish.finish_reason
            self.usage.prompt_tokens = finish.prompt_tokens
            self.usage.cached_tokens = finish.cached_tokens
        return True


class OpenInference:
    """Passes tensors to the backends of a model and bills the tokens that the model reports."""

    def __init__(
        self,
        *,
        routes: Callable[[], RouteTable],
        backends: Backends,
        recorder: Recorder,
        admission: Admission,
        count_prompt: PromptCounter,
        cache_salts: CacheSalts,
        clock: Clock,
    ) -> None:
        self._routes = routes
        self._retrier = Retrier(backends)
        self._recorder = recorder
        self._admission = admission
        self._count_prompt = count_prompt
        self._cache_salts = cache_salts
        self._descriptions = Descriptions(clock)
        self._abandoned: set[asyncio.Task[Any]] = set()
        self._clock = clock

    @property
    def ready(self) -> bool:
        """Whether routes are known."""
        return self._routes() is not EMPTY

    def choose(self, name: str, version: str) -> Choice:
        """Returns where a model is served, in a semantic version or, if that is empty, in any.

        Raises:
            HeadraceError: see `RouteTable.choose`.
        """
        return self._routes().choose(f"{name}@{version}" if version else name, kind=None)

    async def infer(self, message: bytes, caller: Caller) -> bytes:
        """Returns the answer to a `ModelInferRequest`, once its usage is durable.

        Raises:
            HeadraceError: as `InferenceService.Generate`; Triton's text says what is wrong.
        """
        run = self._run_of(message, caller)
        if run.kind == model_pb2.MODEL_KIND_CHAT:
            raise kind_mismatch(run.choice, "it streams its answers: call ModelStreamInfer")

        async def attempt(lease: Lease) -> bytes:
            run.is_running = True
            answer = await calls.infer(
                lease.triton,
                run.request(lease.target.model),
                request_id=run.head.request_id,
                deadline_seconds=None,  # see `_to_its_end`
            )
            run.count(codec.read_response(answer))
            return answer

        answer: bytes = await self._to_its_end(run, attempt)
        await self._recorder.record(self._outcome(run, None))
        return codec.renamed_response(answer, run.choice.model, run.version)

    async def stream(self, message: bytes, caller: Caller, deliver: Deliver) -> None:
        """Delivers the messages that answer one request of a `ModelStreamInfer`.

        Its usage is durable before the last one is delivered.

        Raises:
            HeadraceError: as `infer`. What was generated before is billed.
        """
        run = self._run_of(message, caller)

        async def on_message(answer: bytes, streamed: codec.StreamedResponse) -> None:
            if run.first_seconds is None:
                run.first_seconds = self._clock.monotonic_seconds()
            if run.count(streamed.tokens):
                run.is_recorded = True
                await self._recorder.record(self._outcome(run, None))
            if not run.is_abandoned:
                await deliver(codec.renamed_streamed(answer, run.choice.model, run.version))

        is_chat = run.kind == model_pb2.MODEL_KIND_CHAT

        async def attempt(lease: Lease) -> None:
            run.is_running = True
            await calls.stream(
                lease.triton,
                run.request(lease.target.model),
                request_id=run.head.request_id,
                deadline_seconds=caller.deadline_seconds if is_chat else None,
                on_message=on_message,
            )
            if not run.is_recorded:  # a stream without an end is cut, also with status OK
                raise BackendFailedError("the stream ended before the answer was complete")

        with metrics.LIVE_STREAMS.track_inprogress():
            await (self._attempts if is_chat else self._to_its_end)(run, attempt)

    async def describe(
        self,
        choice: Choice,
        method: str,
        request: Callable[[str], Any],
        response_type: Any,
        *,
        deadline_seconds: float | None,
    ) -> Any:
        """Returns a backend's description of a model, or what a backend said of it before.

        Args:
            choice: the model.
            method: of the protocol.
            request: makes the request from the backend's name of the model.
            response_type: of the answer.
            deadline_seconds: the caller's deadline, on the clock's monotonic time.

        Raises:
            HeadraceError: no backend answers.
        """

        async def attempt(lease: Lease) -> bytes:
            answer = await calls.describe(
                lease.triton,
                method,
                request(lease.target.model),
                response_type,
                deadline_seconds=deadline_seconds,
            )
            found: bytes = answer.SerializeToString()
            return found

        target = choice.target
        key = Key(target.deployment, target.model_version, target.artifact_digest, method)
        description = await self._descriptions.get(
            key, lambda: self._retrier.run(choice, attempt), deadline_seconds=deadline_seconds
        )
        return response_type.FromString(description)

    def _run_of(self, message: bytes, caller: Caller) -> _Run:
        if len(message) > MAX_TENSOR_REQUEST_BYTES:
            text = f"the message has {len(message)} bytes, more than {MAX_TENSOR_REQUEST_BYTES}"
            raise InvalidArgument.too_large("", text, limit_bytes=MAX_TENSOR_REQUEST_BYTES)
        budget = codec.Budget()
        head = codec.read_request(message, budget)
        if PRIORITY in head.parameters:
            # It is Triton's own, where 1 is the highest: only those who may have any may set it.
            caller.identity.allow_priority(MAX_PRIORITY)
        choice = self.choose(head.model_name, head.model_version)
        check_text_sizes(message, max_text_bytes(choice.target.schema), budget)
        check_encoding(message, choice.target.schema.kind, budget)
        is_chat = choice.target.schema.kind == model_pb2.MODEL_KIND_CHAT
        usage_outputs = codec.USAGE_OUTPUTS.get(choice.target.schema.kind, ())
        if altered := sorted(head.altered_outputs):
            # A class count for an output of strings ends the whole tritonserver 2.51.
            raise InvalidArgument.of_field(
                "outputs", f"{altered[0]} cannot be requested with parameters, such as classes"
            )
        request_id = ""
        with suppress(InvalidArgument):  # the protocol allows any id
            request_id = check_uuid(head.request_id, field="id")
        return _Run(
            message=message,
            head=head,
            caller=caller,
            choice=choice,
            usage_outputs=tuple(usage_outputs),
            cache_salt=self._cache_salts.of(caller.identity.tenant) if is_chat else "",
            request_id=request_id or uuid7(self._clock),
            started_seconds=self._clock.monotonic_seconds(),
        )

    async def drain(self) -> None:
        """Returns when the requests that were left to end have ended."""
        await asyncio.gather(*self._abandoned, return_exceptions=True)

    async def _to_its_end(self, run: _Run, attempt: Attempt[Any]) -> Any:
        """Makes attempts at a model that does not generate, and returns the answer.

        A backend cannot stop in the middle of such a request. If its caller leaves then, or its
        deadline passes, it is left to end, with its slot, and billed: else work would be free for
        those who always leave in time.
        """
        left = seconds_left(run.caller.deadline_seconds, self._clock, waiting_for="backend")
        work: asyncio.Task[Any] = asyncio.create_task(self._attempts(run, attempt))
        try:
            done, _ = await asyncio.wait({work}, timeout=left)
            if not done and not run.is_running:  # its wait for a slot ends at the same time
                return await asyncio.shield(work)
        except asyncio.CancelledError:
            self._leave(run, work)
            raise
        if not done:
            self._leave(run, work)
            raise deadline_exceeded("backend")
        try:
            return work.result()
        finally:
            # The traceback of its error has this frame: only a collection would free the cycle, and
            # with it the request.
            del work, done

    def _leave(self, run: _Run, work: asyncio.Task[Any]) -> None:
        """Stops a request that waits; bills one that runs when it has ended."""
        run.is_abandoned = True
        if not run.is_running:
            work.cancel()

        def ended(task: asyncio.Task[Any]) -> None:
            self._abandoned.discard(task)
            # One that failed has recorded itself.
            if not task.cancelled() and task.exception() is None and not run.is_recorded:
                self._recorder.record_later(self._outcome(run, asyncio.CancelledError()))

        self._abandoned.add(work)
        work.add_done_callback(ended)

    async def _attempts(self, run: _Run, attempt: Attempt[Any]) -> Any:
        """Makes attempts once a slot is free. The usage of a failed request is recorded, too."""
        try:
            async with self._admission.slot(run.choice.target, _demand(run)):
                return await self._retrier.run(
                    run.choice,
                    attempt,
                    may_retry=lambda: run.first_seconds is None and not run.is_abandoned,
                    request_id=run.request_id,
                )
        except BaseException as error:
            if not run.is_recorded:
                prompt = self._uncounted_prompt(run, error)
                self._recorder.record_later(self._outcome(run, error), prompt=prompt)
            raise

    def _uncounted_prompt(self, run: _Run, error: BaseException) -> UncountedPrompt | None:
        """Returns a prompt that an engine has read, and has not reported.

        An engine reports it with the end of its answer. Who leaves before pays for it, too.
        """
        if run.kind != model_pb2.MODEL_KIND_CHAT or not run.is_running:
            return None
        if not isinstance(error, asyncio.CancelledError) and (
            run.first_seconds is None or not isinstance(error, DeadlineExceeded)
        ):
            return None
        request = conversation_of(run.message, model=run.choice.model)
        if request is None:
            return None
        count = partial(self._count_prompt, run.choice, request, run.caller.identity.tenant)
        return UncountedPrompt(prompt_bytes(request), count)

    def _outcome(self, run: _Run, error: BaseException | None) -> Outcome:
        start = run.head.tensors_at
        return Outcome(
            operation="infer",
            request_id=run.request_id,
            identity=run.caller.identity,
            choice=run.choice,
            usage=run.usage,
            inputs=(run.message[start : start + MAX_HASHED_BYTES], str(len(run.message) - start)),
            started_seconds=run.started_seconds,
            first_seconds=run.first_seconds,
            finish_reason=run.finish_reason,
            error=error,
        )


def _demand(run: _Run) -> Demand:
    return Demand(
        tenant=run.caller.identity.tenant,
        work=tensor_work(run.message, run.choice.target.schema),
        size_bytes=None,
        deadline_seconds=run.caller.deadline_seconds,
    )


def version_of(choice: Choice) -> str:
    """Returns the semantic version of what is served."""
    return choice.target.model_version.rpartition("/")[2]
