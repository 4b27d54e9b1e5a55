"""The Open Inference Protocol with routes, tenants, versions and bills applied to it.

Tensors pass as they are: what is read of a message, and how it is renamed, is in
`open_inference_wire.py`.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from headrace.common.v1 import model_pb2

from libs.clock import Clock
from libs.errors import InvalidArgument
from libs.ids import check_uuid, uuid7
from libs.routes import EMPTY, Choice, RouteTable
from libs.rpc.channel import MAX_MESSAGE_BYTES
from libs.rpc.identity import Identity
from services.inference import metrics
from services.inference.accounting import Outcome, Recorder
from services.inference.admission import Admission, slots_of
from services.inference.backends.pool import Backends, Lease
from services.inference.domain import BackendFailedError
from services.inference.tensors import calls, codec
from services.inference.tensors.retry import Attempt, Retrier, mismatch

# What gRPC takes, less what renaming adds.
MAX_TENSOR_REQUEST_BYTES = MAX_MESSAGE_BYTES - 4096
# The hash of an input in the log is one of its beginning and its length: tensors are large.
MAX_HASHED_BYTES = 64 * 1024

Deliver = Callable[[bytes], Awaitable[None]]


class Caller(NamedTuple):
    """Who asks, and until when: on the clock's monotonic time, or None."""

    identity: Identity
    deadline_seconds: float | None


@dataclass
class _Run:
    """What is known of a running request."""

    message: bytes
    asked: codec.InferRequestHead
    caller: Caller
    choice: Choice
    needed: tuple[str, ...]
    request_id: str
    started_seconds: float
    first_seconds: float | None = None
    finish_reason: str = ""
    usage: model_pb2.TokenUsage = field(default_factory=model_pb2.TokenUsage)
    is_recorded: bool = False
    answer: bytes = b""

    @property
    def kind(self) -> model_pb2.ModelKind.ValueType:
        return self.choice.target.schema.kind

    @property
    def version(self) -> str:
        return version_of(self.choice)

    def request(self, backend_model: str) -> bytes:
        """Returns the message for one backend."""
        wanted = self.asked.outputs  # none named: all come
        more = [name for name in self.needed if wanted and name not in wanted]
        return codec.renamed_request(self.message, backend_model, more_outputs=more)

    def count(self, answered: codec.InferResponseTokens) -> bool:
        """Adds up what a message says of tokens; returns whether it is the end of the answer."""
        self.usage.completion_tokens += answered.generated_tokens
        self.usage.prompt_tokens += answered.input_tokens
        if self.kind != model_pb2.MODEL_KIND_CHAT:
            return answered.has_outputs
        ending = json.loads(answered.final) if answered.final else {}
        if "completion_tokens" in ending:  # else tokens were counted, none generated
            self.finish_reason = ending["finish_reason"]
            self.usage.prompt_tokens = ending["prompt_tokens"]
            self.usage.cached_tokens = ending["cached_tokens"]
        return bool(ending)


class OpenInference:
    """Passes tensors to the backends of a model and bills the tokens that the models tell."""

    def __init__(
        self, *, backends: Backends, recorder: Recorder, admission: Admission, clock: Clock
    ) -> None:
        self._attempts = Retrier(backends)
        self._recorder = recorder
        self._admission = admission
        self._clock = clock
        self.routes: RouteTable = EMPTY

    def choose(self, name: str, version: str) -> Choice:
        """Returns where a model and version, a semantic one or empty, is served.

        Raises:
            HeadraceError: see `RouteTable.choose`.
        """
        return self.routes.choose(f"{name}@{version}" if version else name, kind=None)

    async def infer(self, message: bytes, caller: Caller) -> bytes:
        """Returns the answer to a `ModelInferRequest`, once its usage is durable.

        Raises:
            HeadraceError: as `InferenceService.Generate`; Triton's own words for what is wrong.
        """
        run = self._begin(message, caller)
        if run.kind == model_pb2.MODEL_KIND_CHAT:
            raise mismatch(run.choice, "it streams its answers: call ModelStreamInfer")

        async def attempt(lease: Lease) -> None:
            request = run.request(lease.backend.backend_model)
            run.answer = await calls.infer(lease.triton, request, request_id=run.asked.request_id)

        await self._carry_out(run, attempt)
        run.count(codec.read_response(run.answer))
        await self._recorder.record(self._outcome(run, None))
        return codec.renamed_response(run.answer, run.choice.model, run.version)

    async def stream(self, message: bytes, caller: Caller, deliver: Deliver) -> None:
        """Delivers the messages that answer one request of a `ModelStreamInfer`.

        Its usage is durable before the last one is delivered.

        Raises:
            HeadraceError: as `infer`. What was generated before is billed.
        """
        run = self._begin(message, caller)

        async def take(told: bytes, streamed: codec.StreamedResponse) -> None:
            if run.first_seconds is None:
                run.first_seconds = self._clock.monotonic_seconds()
            if run.count(streamed.answered):
                run.is_recorded = True
                await self._recorder.record(self._outcome(run, None))
            await deliver(codec.renamed_streamed(told, run.choice.model, run.version))

        async def attempt(lease: Lease) -> None:
            request = run.request(lease.backend.backend_model)
            await calls.stream(lease.triton, request, request_id=run.asked.request_id, take=take)
            if not run.is_recorded:  # an end that says nothing is a failure, also with status OK
                raise BackendFailedError("the stream ended without an ending")

        with metrics.LIVE_STREAMS.track_inprogress():
            await self._carry_out(run, attempt)

    async def describe(
        self, choice: Choice, method: str, request: Callable[[str], Any], response_type: Any
    ) -> Any:
        """Returns what a backend says of a model.

        Args:
            choice: the model.
            method: of the protocol.
            request: makes it for the name that the backend has for the model.
            response_type: of the answer.

        Raises:
            HeadraceError: no backend answers.
        """

        async def attempt(lease: Lease) -> Any:
            name = lease.backend.backend_model
            return await calls.describe(lease.triton, method, request(name), response_type)

        return await self._attempts.run(choice, attempt)

    def _begin(self, message: bytes, caller: Caller) -> _Run:
        if len(message) > MAX_TENSOR_REQUEST_BYTES:
            text = f"the message has {len(message)} bytes, more than {MAX_TENSOR_REQUEST_BYTES}"
            raise InvalidArgument.too_large("", text, limit_bytes=MAX_TENSOR_REQUEST_BYTES)
        asked = codec.read_request(message)
        choice = self.choose(asked.model_name, asked.model_version)
        needed = codec.USAGE_OUTPUTS.get(choice.target.schema.kind, ())
        if altered := sorted(asked.altered_outputs & set(needed)):
            raise InvalidArgument.of_field(
                "outputs", f"{altered[0]} comes as it is, since it tells what is billed"
            )
        request_id = ""
        with suppress(InvalidArgument):  # the protocol allows any id
            request_id = check_uuid(asked.request_id, field="id")
        return _Run(
            message=message,
            asked=asked,
            caller=caller,
            choice=choice,
            needed=tuple(needed),
            request_id=request_id or uuid7(self._clock),
            started_seconds=self._clock.monotonic_seconds(),
        )

    async def _carry_out(self, run: _Run, attempt: Attempt) -> None:
        """Makes attempts once there is a slot. What a failed request used is recorded, too."""
        try:
            async with self._admission.queue(run.choice.target.deployment).slot(
                slots=slots_of(run.choice.target),
                deadline_seconds=run.caller.deadline_seconds,
                priority=0,
            ):
                await self._attempts.run(
                    run.choice, attempt, may_retry=lambda: run.first_seconds is None
                )
        except BaseException as error:
            if not run.is_recorded:
                self._recorder.record_later(self._outcome(run, error))
            raise

    def _outcome(self, run: _Run, error: BaseException | None) -> Outcome:
        begin = run.asked.tensors_at
        return Outcome(
            operation="infer",
            request_id=run.request_id,
            identity=run.caller.identity,
            choice=run.choice,
            usage=run.usage,
            inputs=(run.message[begin : begin + MAX_HASHED_BYTES], str(len(run.message) - begin)),
            started_seconds=run.started_seconds,
            first_seconds=run.first_seconds,
            finish_reason=run.finish_reason,
            error=error,
        )


def version_of(choice: Choice) -> str:
    """Returns the semantic version of what is served."""
    return choice.target.model_version.rpartition("/")[2]
