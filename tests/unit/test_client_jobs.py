"""The client of jobs that the command line uses."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from headrace.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from typing_extensions import override

from deploy.client.edge import EdgeClient
from deploy.client.jobs import (
    STATES,
    JobClient,
    answer_of,
    generation,
    has_ended,
    job_name,
    payload_of_json,
    state_of,
)
from deploy.errors import CliError
from libs.errors import Unavailable
from libs.rpc.status import DETAILS_KEY, to_status


class Jobs(jobs_pb2_grpc.JobServiceServicer):
    """Has 2,500 jobs, and interrupts the first watch."""

    def __init__(self) -> None:
        self.page_sizes: list[int] = []
        self.watches = 0
        self.deleted: list[str] = []

    @override
    def ListJobs(self, request: Any, context: Any) -> jobs_pb2.ListJobsResponse:
        self.page_sizes.append(request.page_size)
        start = int(request.page_token or 0)
        end = min(start + request.page_size, 2500)
        return jobs_pb2.ListJobsResponse(
            jobs=[jobs_pb2.Job(name=f"jobs/{number}") for number in range(start, end)],
            next_page_token=str(end) if end < 2500 else "",
        )

    @override
    def DeleteJob(self, request: Any, context: Any) -> jobs_pb2.DeleteJobResponse:
        self.deleted.append(request.name)
        return jobs_pb2.DeleteJobResponse()

    @override
    def WatchJob(self, request: Any, context: Any) -> Iterator[jobs_pb2.WatchJobResponse]:
        self.watches += 1
        running = jobs_pb2.Job(name=request.name, state=jobs_pb2.JOB_STATE_RUNNING)
        yield jobs_pb2.WatchJobResponse(job=running)
        if self.watches == 1:
            error = Unavailable(
                "restarts", reason="DEPENDENCY_UNAVAILABLE", retry_after_seconds=0.01
            )
            details = to_status(error).SerializeToString()
            context.set_trailing_metadata(((DETAILS_KEY, details),))
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarts")
        ended = jobs_pb2.Job(name=request.name, state=jobs_pb2.JOB_STATE_CANCELLED)
        yield jobs_pb2.WatchJobResponse(job=ended)


@pytest.fixture
def jobs() -> Jobs:
    return Jobs()  # type: ignore[abstract]  # what it does not define answers UNIMPLEMENTED


@pytest.fixture
def client(jobs: Jobs) -> Iterator[JobClient]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    jobs_pb2_grpc.add_JobServiceServicer_to_server(jobs, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with EdgeClient(f"127.0.0.1:{port}", token="t") as edge:  # noqa: S106  # not a secret
        yield JobClient(edge)
    server.stop(None)


def test_a_list_has_as_many_pages_as_it_needs(client: JobClient, jobs: Jobs) -> None:
    """Up to the limit, or all."""
    assert len(client.list(limit=1500)) == 1500
    assert jobs.page_sizes == [1000, 500]
    assert len(client.list(limit=10_000)) == 2500


def test_a_watch_continues_after_a_restart(client: JobClient, jobs: Jobs) -> None:
    """Without the changes that it has had."""
    states = [state_of(job) for job in client.watch("jobs/j")]
    assert states == ["running", "cancelled"]
    assert jobs.watches == 2


def test_a_job_is_deleted_by_its_name(client: JobClient, jobs: Jobs) -> None:
    """Once."""
    client.delete("jobs/j")
    assert jobs.deleted == ["jobs/j"]


def test_names_and_states_are_those_of_the_command_line() -> None:
    """An id is enough; states are lower-case words, also those of a later version."""
    assert job_name("7") == job_name("jobs/7") == "jobs/7"
    assert STATES == ("queued", "running", "succeeded", "failed", "cancelled")
    assert state_of(jobs_pb2.Job(state=77)) == "77"  # type: ignore[arg-type]  # of a later version
    assert not has_ended(jobs_pb2.Job(state=jobs_pb2.JOB_STATE_QUEUED))
    assert has_ended(jobs_pb2.Job(state=jobs_pb2.JOB_STATE_CANCELLED))


def test_payloads_are_made_of_a_prompt_or_of_json() -> None:
    """JSON that is no payload is an error that the user can fix."""
    payload = generation("hi", model="smollm2", max_tokens=5, temperature=0.0)
    assert payload.generate.messages[0].parts[0].text == "hi"
    assert payload_of_json('{"embed": {"model": "minilm", "texts": ["a"]}}').HasField("embed")
    with pytest.raises(CliError, match="payload is not a valid"):
        payload_of_json('{"embed": {"modell": "minilm"}}')
    assert answer_of(jobs_pb2.Job()) == ""
