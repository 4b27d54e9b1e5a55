"""Between protos and the domain."""

from __future__ import annotations

from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp
from headrace.events.v1 import events_pb2
from headrace.jobs.v1 import jobs_pb2

from libs.errors import InvalidArgument
from libs.ids import check_uuid
from services.jobs.domain import Failure, Finished, Job, Started


def job_id_of_name(name: str) -> str:
    """Returns the id in `jobs/{job_id}`.

    Raises:
        InvalidArgument: the name is not of that form.
    """
    collection, _, job_id = name.partition("/")
    if collection != "jobs":
        raise InvalidArgument.of_field("name", "must be jobs/JOB_ID")
    return check_uuid(job_id, field="name")


def job_to_proto(job: Job) -> jobs_pb2.Job:
    """Writes a job."""
    return jobs_pb2.Job(
        name=job.name,
        state=jobs_pb2.JobState.ValueType(job.state),
        payload=jobs_pb2.JobPayload.FromString(job.payload),
        result=None if job.result is None else jobs_pb2.JobResult.FromString(job.result),
        error=None if job.failure is None else _failure_to_proto(job.failure),
        attempt_count=job.attempt_count,
        create_time=_time_to_proto(job.create_time),
        update_time=_time_to_proto(job.update_time),
    )


def payload_to_bytes(payload: jobs_pb2.JobPayload) -> bytes:
    """Writes a payload such that equal ones have equal bytes."""
    return payload.SerializeToString(deterministic=True)


def started_from_event(event: events_pb2.JobStarted) -> Started:
    """Reads that a worker has begun."""
    return Started(event.attempt)


def finished_from_event(event: events_pb2.JobFinished) -> Finished:
    """Reads how a worker has ended; without a result it has failed."""
    if event.result.WhichOneof("work") is not None:
        return Finished(event.attempt, result=event.result.SerializeToString())
    error = event.error
    failure = Failure(
        error.code or "INTERNAL",
        error.reason or "INTERNAL",
        error.message or "the worker told neither a result nor an error",
    )
    return Finished(event.attempt, failure=failure)


def _failure_to_proto(failure: Failure) -> jobs_pb2.JobError:
    return jobs_pb2.JobError(code=failure.code, reason=failure.reason, message=failure.message)


def _time_to_proto(moment: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp
