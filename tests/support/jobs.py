"""A client of the jobs service, and fake models for workers that a test controls."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2
from headrace.common.v1.embedding_pb2 import Embedding
from headrace.common.v1.usage_pb2 import TokenUsage
from headrace.cost.v1 import cost_internal_pb2, cost_internal_pb2_grpc
from headrace.embedding.v1 import embedding_pb2, embedding_pb2_grpc
from headrace.events.v1 import events_pb2
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from headrace.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from headrace.jobs.v1.jobs_pb2 import JobState
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError
from typing_extensions import override

from libs.bus.connection import client_of, connect, ensure_streams
from libs.bus.publisher import Publisher
from libs.bus.subjects import JOB_FINISHED, JOB_STARTED
from libs.chat.wire import text_message
from libs.clock import SystemClock
from libs.metering.prices import PriceBook
from libs.metering.usage import UsageRecorder
from libs.rpc.identity import Identity, identity_of
from tests.support.usage import PRICE


def user(tenant: str, name: str) -> Identity:
    """Returns a user who may submit jobs."""
    return Identity(tenant, name, frozenset({"infer"}))


ANN = user("acme", "ann")
EVE = user("evil", "eve")

QUEUED, RUNNING = JobState.JOB_STATE_QUEUED, JobState.JOB_STATE_RUNNING
SUCCEEDED, FAILED = JobState.JOB_STATE_SUCCEEDED, JobState.JOB_STATE_FAILED
CANCELLED = JobState.JOB_STATE_CANCELLED
MODEL_VERSION = "models/smollm2/versions/1.0.0"
USAGE = TokenUsage(prompt_tokens=17, completion_tokens=33, cached_tokens=5)


def generation(text: str = "hello", **fields: Any) -> jobs_pb2.JobPayload:
    """Asks for an answer."""
    message = text_message(inference_pb2.ROLE_USER, text)
    return jobs_pb2.JobPayload(
        generate=inference_pb2.GenerateRequest(
            **{"model": "smollm2", "messages": [message], **fields}
        )
    )


def embedding(*texts: str) -> jobs_pb2.JobPayload:
    """Asks for vectors."""
    return jobs_pb2.JobPayload(embed=embedding_pb2.EmbedRequest(model="minilm", texts=texts))


def result(text: str = "done") -> jobs_pb2.JobResult:
    """What a worker may report."""
    message = text_message(inference_pb2.ROLE_ASSISTANT, text)
    return jobs_pb2.JobResult(generate=jobs_pb2.GenerateResult(message=message))


def answer_of(job: jobs_pb2.Job) -> str:
    """Returns the text of a generation that has succeeded."""
    (part,) = job.result.generate.message.parts
    return part.text


def reason_of(job: jobs_pb2.Job) -> str:
    """Returns the reason in a job's error."""
    return str(error_info(job.error).reason)


def error_info(status: status_pb2.Status) -> error_details_pb2.ErrorInfo:
    """Returns the `ErrorInfo` of an error."""
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    return info


class JobClient:
    """Calls a jobs service, as Ann of acme unless a call names another user."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub: jobs_pb2_grpc.JobServiceAsyncStub = jobs_pb2_grpc.JobServiceStub(channel)

    async def submit(
        self,
        payload: jobs_pb2.JobPayload,
        *,
        job_id: str = "",
        who: Identity = ANN,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> jobs_pb2.Job:
        answer = await self.stub.SubmitJob(
            jobs_pb2.SubmitJobRequest(job_id=job_id, payload=payload),
            metadata=(*who.metadata(), *metadata),
        )
        return answer.job

    async def get(self, name: str, *, who: Identity = ANN, **fields: Any) -> jobs_pb2.Job:
        request = jobs_pb2.GetJobRequest(name=name, **fields)
        return (await self.stub.GetJob(request, metadata=who.metadata())).job

    async def cancel(self, name: str, *, who: Identity = ANN) -> jobs_pb2.Job:
        request = jobs_pb2.CancelJobRequest(name=name)
        return (await self.stub.CancelJob(request, metadata=who.metadata())).job

    async def delete(self, name: str, *, who: Identity = ANN) -> None:
        request = jobs_pb2.DeleteJobRequest(name=name)
        await self.stub.DeleteJob(request, metadata=who.metadata())

    async def list(self, *, who: Identity = ANN, **fields: Any) -> jobs_pb2.ListJobsResponse:
        request = jobs_pb2.ListJobsRequest(**fields)
        return await self.stub.ListJobs(request, metadata=who.metadata())

    async def watch(
        self, name: str, *, who: Identity = ANN, **fields: Any
    ) -> AsyncIterator[jobs_pb2.Job]:
        request = jobs_pb2.WatchJobRequest(name=name, **fields)
        async for message in self.stub.WatchJob(request, metadata=who.metadata()):
            yield message.job

    async def ended(self, name: str, *, seconds: float = 60) -> jobs_pb2.Job:
        """Waits until a job has ended, over restarts of the service."""
        async with asyncio.timeout(seconds):
            while True:
                try:
                    async for job in self.watch(name):
                        if job.state in (SUCCEEDED, FAILED, CANCELLED):
                            return job
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise


class Bus:
    """Reports as a worker does, and reads what is on the bus."""

    def __init__(self, js: JetStreamContext) -> None:
        self.js = js
        self.client = client_of(js)
        self.publisher = Publisher(js)

    async def started(self, job: jobs_pb2.Job, attempt: int) -> None:
        """Reports that a worker started."""
        event = events_pb2.JobStarted(
            job_id=id_of(job), attempt=attempt, job_create_time=_create_time(job)
        )
        await self.publisher.publish(JOB_STARTED, event, message_id=str(uuid.uuid4()))

    async def finished(self, job: jobs_pb2.Job, attempt: int = 1, **outcome: Any) -> None:
        """Reports that a worker finished, with `result` or `error`."""
        event = events_pb2.JobFinished(
            job_id=id_of(job), attempt=attempt, job_create_time=_create_time(job), **outcome
        )
        await self.publisher.publish(JOB_FINISHED, event, message_id=str(uuid.uuid4()))

    async def submitted(self) -> list[tuple[dict[str, str], events_pb2.JobSubmitted]]:
        """Returns the headers and events in the stream of jobs, the oldest first."""
        try:
            state = (await self.js.stream_info("HEADRACE_JOBS")).state
        except NotFoundError:  # the bus lost everything
            return []
        found = []
        for sequence in range(state.first_seq, state.last_seq + 1) if state.messages else ():
            message = await self.js.get_msg("HEADRACE_JOBS", sequence)
            event = events_pb2.JobSubmitted.FromString(message.data or b"")
            found.append((dict(message.headers or {}), event))
        return found

    async def message_of(self, job: jobs_pb2.Job) -> tuple[dict[str, str], events_pb2.JobSubmitted]:
        """Waits until a job is in the stream; returns its last message."""
        async with asyncio.timeout(30):
            while True:
                for headers, event in reversed(await self.submitted()):
                    if event.job_id == id_of(job):
                        return headers, event
                await asyncio.sleep(0.02)


@asynccontextmanager
async def job_bus(nats_url: str) -> AsyncIterator[Bus]:
    """Connects to the bus."""
    client = await connect(nats_url, name="test")
    await ensure_streams(client.jetstream())
    try:
        yield Bus(client.jetstream())
    finally:
        await client.drain()


def _create_time(job: jobs_pb2.Job) -> Timestamp | None:
    return job.create_time if job.HasField("create_time") else None


def id_of(job: jobs_pb2.Job) -> str:
    return job.name.removeprefix("jobs/")


class Models(inference_pb2_grpc.InferenceServiceServicer):
    """Answers "one two three", token by token, and vectors; records usage as inference does.

    Attributes:
        requests: the requests so far, with their metadata.
        open: while it is not set, answers stop after the first token.
        running: calls that run now.
        cancelled: calls that were cancelled.
        errors: raised one by one, by the next calls.
        text: of each of three deltas.
        recorder: records the usage; None: it is not recorded.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[Any, dict[str, Any]]] = []
        self.open = asyncio.Event()
        self.open.set()
        self.running = self.cancelled = 0
        self.changed = asyncio.Condition()
        self.errors: list[Exception] = []
        self.text: tuple[str, ...] = ("one ", "two ", "three")
        self.with_final = True
        self.vector_length = 2
        self.recorder: UsageRecorder | None = None

    @override
    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._begin(request, context)
        try:
            yield inference_pb2.GenerateResponse(
                started=inference_pb2.Started(
                    request_id=request.request_id, model_version=MODEL_VERSION
                )
            )
            yield inference_pb2.GenerateResponse()  # an event that this version does not know
            for text in self.text:
                yield inference_pb2.GenerateResponse(
                    delta=inference_pb2.Delta(text=text, token_count=1)
                )
                await self.open.wait()
            if self.with_final:
                yield inference_pb2.GenerateResponse(final=await self._final(request, context))
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            await self._end()

    async def embed(self, request: Any, context: Any) -> embedding_pb2.EmbedResponse:
        """Answers with a vector for each text."""
        await self._begin(request, context)
        try:
            await self.open.wait()
        finally:
            await self._end()
        return embedding_pb2.EmbedResponse(
            embeddings=[Embedding(values=[1.0] * self.vector_length) for _ in request.texts],
            request_id=request.request_id,
        )

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition that changes as calls start and end."""
        async with asyncio.timeout(30), self.changed:
            await self.changed.wait_for(condition)

    async def _begin(self, request: Any, context: Any) -> None:
        self.requests.append((request, dict(context.invocation_metadata())))
        if self.errors:
            raise self.errors.pop(0)
        self.running += 1
        async with self.changed:
            self.changed.notify_all()

    async def _end(self) -> None:
        self.running -= 1
        async with self.changed:
            self.changed.notify_all()

    async def _final(self, request: Any, context: Any) -> inference_pb2.Final:
        cost_nano_usd = 0
        if self.recorder is not None:
            cost_nano_usd = await self.recorder.record(
                request_id=request.request_id,
                identity=identity_of(context),
                model=request.model,
                model_version=MODEL_VERSION,
                usage=USAGE,
                operation="generate",
            )
        return inference_pb2.Final(
            finish_reason=inference_pb2.FINISH_REASON_STOP,
            usage=USAGE,
            cost_nano_usd=cost_nano_usd,
            request_id=request.request_id,
            model_version=MODEL_VERSION,
        )

    def register(self, server: grpc.aio.Server) -> None:
        """Registers itself as inference, as embedding cache and as cost."""
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, server)
        embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(_Embedding(self), server)
        cost_internal_pb2_grpc.add_CostInternalServiceServicer_to_server(_Prices(), server)


class _Embedding(embedding_pb2_grpc.EmbeddingServiceServicer):
    """The embedding cache with the same models."""

    def __init__(self, models: Models) -> None:
        self._models = models

    @override
    async def Embed(self, request: Any, context: Any) -> embedding_pb2.EmbedResponse:
        return await self._models.embed(request, context)


class _Prices(cost_internal_pb2_grpc.CostInternalServiceServicer):
    """Pushes the price of the tests."""

    @override
    async def WatchPrices(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield cost_internal_pb2.WatchPricesResponse(prices=[PRICE])
        await asyncio.Event().wait()


def usage_recorder(bus: Bus) -> UsageRecorder:
    """Records usage at the price of the tests."""
    prices = PriceBook([PRICE])
    return UsageRecorder(bus.publisher, SystemClock(), prices=lambda: prices)
