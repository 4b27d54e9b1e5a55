"""Doing what a job asks for, through the services that users call."""

from __future__ import annotations

import uuid

from headrace.embedding.v1 import embedding_pb2, embedding_pb2_grpc
from headrace.events.v1 import events_pb2
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from headrace.jobs.v1 import jobs_pb2

from libs.errors import InvalidArgument, ResourceExhausted, Unavailable
from libs.rpc.identity import Identity
from libs.rpc.status import headrace_errors


class ResultTooLarge(ResourceExhausted):
    """The result is larger than results may be; it would be the next time, too."""


class Execution:
    """Runs the work of jobs in the name of who submitted them."""

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

    async def run(self, job: events_pb2.JobSubmitted) -> jobs_pb2.JobResult:
        """Returns the result of a job.

        Raises:
            HeadraceError: as the service raised it.
            ResultTooLarge: there is a result, but it is too large.
        """
        # However often a job runs, its usage has one id: the ledger books it once.
        identity = Identity(job.identity.tenant, job.identity.user, usage_id=_usage_id(job.job_id))
        metadata = identity.metadata()
        with headrace_errors():
            match job.payload.WhichOneof("work"):
                case "generate":
                    result = await self._generate(job, metadata)
                case "embed":
                    result = await self._embed(job, metadata)
                case _:
                    raise InvalidArgument.of_field("payload", "must have one of generate and embed")
        self._check_size(result.ByteSize())
        return result

    async def _generate(
        self, job: events_pb2.JobSubmitted, metadata: tuple[tuple[str, str], ...]
    ) -> jobs_pb2.JobResult:
        request = inference_pb2.GenerateRequest()
        request.CopyFrom(job.payload.generate)
        request.request_id = request.request_id or job.job_id
        texts: list[str] = []
        size_bytes = 0
        final: inference_pb2.Final | None = None
        call = self._inference.Generate(request, metadata=metadata, timeout=self._timeout_seconds)
        try:
            async for response in call:
                match response.WhichOneof("event"):
                    case "final":
                        final = response.final
                    case "delta":
                        texts.append(response.delta.text)
                        size_bytes += len(response.delta.text.encode())
                        self._check_size(size_bytes)
                    case _:  # `started`, or an event of a newer version
                        pass
        finally:
            call.cancel()  # an answer that nobody takes stops the engine
        if final is None:
            raise Unavailable("the answer broke off without an end", reason="BACKEND_FAILED")
        answer = jobs_pb2.GenerateResult(text="".join(texts), final=final)
        return jobs_pb2.JobResult(generate=answer)

    async def _embed(
        self, job: events_pb2.JobSubmitted, metadata: tuple[tuple[str, str], ...]
    ) -> jobs_pb2.JobResult:
        request = embedding_pb2.EmbedRequest()
        request.CopyFrom(job.payload.embed)
        request.request_id = request.request_id or job.job_id
        response = await self._embedding.Embed(
            request, metadata=metadata, timeout=self._timeout_seconds
        )
        return jobs_pb2.JobResult(embed=response)

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._max_result_bytes:
            raise ResultTooLarge(
                f"the result has {size_bytes} bytes, more than {self._max_result_bytes}",
                reason="MESSAGE_TOO_LARGE",
                metadata={"limit_bytes": str(self._max_result_bytes)},
            )


def _usage_id(job_id: str) -> str:
    # Derived, not the job's id itself: that one its submitter chose, and ids of usage are known.
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"headrace:jobs/{job_id}"))
