"""Submits, lists, watches, cancels and deletes jobs, as a user."""

from __future__ import annotations

import time
from collections.abc import Iterator

import grpc
from google.protobuf import json_format
from headrace.inference.v1 import inference_pb2
from headrace.jobs.v1 import jobs_pb2, jobs_pb2_grpc

from deploy.client.edge import EdgeClient, retry_seconds
from deploy.errors import CliError
from libs.chat.wire import text_message

CALL_TIMEOUT_SECONDS = 20.0
MAX_PAGE_SIZE = 1000
MAX_RETRY_PAUSE_SECONDS = 2.0
WATCH_RETRIES = 30

STATES = tuple(
    name.removeprefix("JOB_STATE_").lower()
    for name, value in jobs_pb2.JobState.items()
    if value != jobs_pb2.JOB_STATE_UNSPECIFIED
)
_OPEN = (jobs_pb2.JOB_STATE_QUEUED, jobs_pb2.JOB_STATE_RUNNING)


class JobClient:
    """Calls the jobs service. The client's token must have the scope `infer`.

    Raises:
        grpc.RpcError: a call failed, from any method.
    """

    def __init__(self, edge: EdgeClient) -> None:
        self._metadata = edge.metadata
        self._stub = jobs_pb2_grpc.JobServiceStub(edge.channel)

    def submit(self, payload: jobs_pb2.JobPayload, *, job_id: str = "") -> jobs_pb2.Job:
        """Submits a job and returns it; the service chooses its id if `job_id` is empty."""
        request = jobs_pb2.SubmitJobRequest(job_id=job_id, payload=payload)
        return self._stub.SubmitJob(
            request, metadata=self._metadata, timeout=CALL_TIMEOUT_SECONDS
        ).job

    def list(self, *, state: str = "", limit: int) -> list[jobs_pb2.Job]:
        """Returns the newest jobs, without payloads and results.

        Args:
            state: one of `STATES`; empty: all.
            limit: how many jobs at most.
        """
        request = jobs_pb2.ListJobsRequest(
            filter=f'state = "JOB_STATE_{state.upper()}"' if state else ""
        )
        found: list[jobs_pb2.Job] = []
        while True:
            request.page_size = min(limit - len(found), MAX_PAGE_SIZE)
            page = self._stub.ListJobs(
                request, metadata=self._metadata, timeout=CALL_TIMEOUT_SECONDS
            )
            found += page.jobs
            if len(found) >= limit or not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def get(self, name: str) -> jobs_pb2.Job:
        """Returns a job with payload and result."""
        request = jobs_pb2.GetJobRequest(name=name)
        return self._stub.GetJob(request, metadata=self._metadata, timeout=CALL_TIMEOUT_SECONDS).job

    def watch(self, name: str) -> Iterator[jobs_pb2.Job]:
        """Yields a job as it is now and after each change; returns when it has ended.

        The jobs have neither payload nor result. Restarts of the service are waited for.
        """
        request = jobs_pb2.WatchJobRequest(name=name, view=jobs_pb2.JOB_VIEW_BASIC)
        last = jobs_pb2.Job()
        retries = 0
        while True:
            try:
                for response in self._stub.WatchJob(request, metadata=self._metadata):
                    retries = 0
                    if response.job != last:
                        last = response.job
                        yield last
            except grpc.RpcError as error:
                pause = retry_seconds(error)
                retries += 1
                if (
                    error.code() != grpc.StatusCode.UNAVAILABLE
                    or pause is None
                    or retries > WATCH_RETRIES
                ):
                    raise
                time.sleep(min(pause, MAX_RETRY_PAUSE_SECONDS))
            else:
                return

    def cancel(self, name: str) -> jobs_pb2.Job:
        """Cancels a job and returns it."""
        request = jobs_pb2.CancelJobRequest(name=name)
        return self._stub.CancelJob(
            request, metadata=self._metadata, timeout=CALL_TIMEOUT_SECONDS
        ).job

    def delete(self, name: str) -> None:
        """Deletes a job with its payload and result; one that has not ended is cancelled."""
        request = jobs_pb2.DeleteJobRequest(name=name)
        self._stub.DeleteJob(request, metadata=self._metadata, timeout=CALL_TIMEOUT_SECONDS)


def job_name(text: str) -> str:
    """Returns `jobs/{job_id}` of a name or an id."""
    return text if text.startswith("jobs/") else f"jobs/{text}"


def state_of(job: jobs_pb2.Job) -> str:
    """Returns the state as one of `STATES`, or its number if it is unknown."""
    if job.state not in jobs_pb2.JobState.values():
        return str(job.state)
    return jobs_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()


def has_ended(job: jobs_pb2.Job) -> bool:
    """Returns whether the job changes no more."""
    return job.state not in _OPEN


def answer_of(job: jobs_pb2.Job) -> str:
    """Returns the generated text, empty if the job has none."""
    return "".join(part.text for part in job.result.generate.message.parts)


def generation(
    prompt: str, *, model: str, max_tokens: int, temperature: float
) -> jobs_pb2.JobPayload:
    """Returns the payload that generates the answer to one message."""
    request = inference_pb2.GenerateRequest(
        model=model,
        messages=[text_message(inference_pb2.ROLE_USER, prompt)],
        max_tokens=max_tokens,
        temperature=temperature,
    )
    return jobs_pb2.JobPayload(generate=request)


def payload_of_json(text: str) -> jobs_pb2.JobPayload:
    """Returns the payload in JSON text.

    Raises:
        CliError: the text is not a `JobPayload`; the message says where.
    """
    payload = jobs_pb2.JobPayload()
    try:
        json_format.Parse(text, payload)
    except json_format.ParseError as error:
        raise CliError(
            f"the payload is not a valid headrace.jobs.v1.JobPayload: {error}"
        ) from error
    return payload
