"""Does the work of jobs, through the services that users call."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.embedding.v1 import embedding_pb2, embedding_pb2_grpc
from headrace.events.v1 import events_pb2
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from headrace.jobs.v1 import jobs_pb2

from libs.chat.wire import text_message
from libs.errors import InvalidArgument, ResourceExhausted, Unavailable
from libs.rpc.status import headrace_errors
from services.worker.identity import identity_of_job


class ResultTooLarge(ResourceExhausted):
    """The result is larger than the limit, as it would be in the next attempt."""


@dataclass
class Progress:
    """How far an attempt has come.

    Attributes:
        request_id: of the request that it made.
        model_version: which version answers, `models/{model}/versions/{semver}`; empty: unknown.
        token_count: the tokens that were generated so far.
    """

    request_id: str = ""
    model_version: str = ""
    token_count: int = 0


class Execution:
    """Runs the work of jobs in the name of the users who submitted them."""

    def __init__(
        self,
        *,
        inference: inference_pb2_grpc.InferenceServiceAsyncStub,
        embedding: embedding_pb2_grpc.EmbeddingServiceAsyncStub,
        timeout_seconds: float,
        max_result_bytes: int,
    ) -> None:
        self._inference = inference
        self._embedding = embedding
        self._timeout_seconds = timeout_seconds
        self._max_result_bytes = max_result_bytes

    async def run(self, job: events_pb2.JobSubmitted, progress: Progress) -> jobs_pb2.JobResult:
        """Returns the result of a job; `progress` is kept up to date meanwhile.

        Raises:
            HeadraceError: as the service raised it.
            ResultTooLarge: there is a result, but it is too large.
        """
        with headrace_errors():
            match job.payload.WhichOneof("work"):
                case "generate":
                    result = await self._generate(job, progress)
                case "embed":
                    result = await self._embed(job)
                case _:
                    raise InvalidArgument.of_field("payload", "must have one of generate and embed")
        self._check_size(result.ByteSize())
        return result

    async def _generate(
        self, job: events_pb2.JobSubmitted, progress: Progress
    ) -> jobs_pb2.JobResult:
        request = inference_pb2.GenerateRequest()
        request.CopyFrom(job.payload.generate)
        request.request_id = progress.request_id = request.request_id or job.job_id
        texts: list[str] = []
        size_bytes = 0
        final: inference_pb2.Final | None = None
        call = self._inference.Generate(
            request, metadata=identity_of_job(job).metadata(), timeout=self._timeout_seconds
        )
        try:
            async for response in call:
                match response.WhichOneof("event"):
                    case "started":
                        progress.model_version = response.started.model_version
                    case "delta":
                        progress.token_count += response.delta.token_count
                        texts.append(response.delta.text)
                        size_bytes += len(response.delta.text.encode())
                        self._check_size(size_bytes)
                    case "final":
                        final = response.final
                    case _:  # from a later version
                        continue
        finally:
            call.cancel()  # stops the engine if the answer is not complete
        if final is None:
            raise Unavailable("the answer ended early", reason="BACKEND_FAILED")
        message = text_message(inference_pb2.ROLE_ASSISTANT, "".join(texts))
        return jobs_pb2.JobResult(generate=jobs_pb2.GenerateResult(message=message, final=final))

    async def _embed(self, job: events_pb2.JobSubmitted) -> jobs_pb2.JobResult:
        request = embedding_pb2.EmbedRequest()
        request.CopyFrom(job.payload.embed)
        request.request_id = request.request_id or job.job_id
        response = await self._embedding.Embed(
            request, metadata=identity_of_job(job).metadata(), timeout=self._timeout_seconds
        )
        return jobs_pb2.JobResult(embed=response)

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._max_result_bytes:
            raise ResultTooLarge(
                f"the result has {size_bytes} bytes, more than {self._max_result_bytes}",
                reason="MESSAGE_TOO_LARGE",
                metadata={"limit_bytes": str(self._max_result_bytes)},
            )
