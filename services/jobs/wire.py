"""Between protos and the domain."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import TypeVar

import structlog
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from headrace.events.v1 import events_pb2
from headrace.jobs.v1 import jobs_pb2
from prometheus_client import Counter

from libs.errors import HeadraceError, Internal, InvalidArgument
from libs.ids import check_uuid
from libs.rpc.filter import filter_error, parse_filter
from libs.rpc.names import tenant_name
from libs.rpc.status import to_status
from libs.timestamps import to_timestamp
from services.jobs.domain import Finished, Job, Started, State
from services.jobs.outbox_store import OutboxJob

_log = structlog.get_logger()

_UNREADABLE = Counter(
    "headrace_jobs_unreadable_contents",
    "Payloads, results and errors that were left out of a response because they are broken.",
)

M = TypeVar("M", bound=Message)


def job_id_of_name(name: str) -> str:
    """Returns the id in `jobs/{job_id}`.

    Raises:
        InvalidArgument: the name does not have that form.
    """
    collection, _, job_id = name.partition("/")
    if collection != "jobs":
        raise InvalidArgument.of_field("name", "must be jobs/JOB_ID")
    return check_uuid(job_id, field="name")


def check_no_batch(parent: str) -> None:
    """Checks that a request names no batch.

    Raises:
        InvalidArgument: it does.
    """
    if parent:
        raise InvalidArgument.of_field("parent", "batches are not supported yet; leave it empty")


def is_full(view: jobs_pb2.JobView.ValueType, *, default: bool) -> bool:
    """Returns whether a view has payload and result.

    Args:
        view: of the request.
        default: what an unspecified view has.

    Raises:
        InvalidArgument: it is unknown.
    """
    if view not in jobs_pb2.JobView.values():
        raise InvalidArgument.of_field("view", "must be JOB_VIEW_BASIC or JOB_VIEW_FULL")
    if view == jobs_pb2.JOB_VIEW_UNSPECIFIED:
        return default
    return view == jobs_pb2.JOB_VIEW_FULL


def state_of_filter(text: str) -> State | None:
    """Returns the state that a filter selects; None: all states.

    Raises:
        InvalidArgument: the filter is invalid.
    """
    name = parse_filter(text, fields=("state",)).get("state")
    if name is None:
        return None
    states = {f"JOB_STATE_{state.name}": state for state in State}
    if name not in states:
        raise filter_error(f"unknown state {name[:64]}; use one of {', '.join(states)}")
    return states[name]


def job_to_proto(job: Job, *, full: bool = True) -> jobs_pb2.Job:
    """Writes a job; `full`: with payload and result.

    Contents that cannot be parsed are left out: the rest of the job is still worth showing.
    """
    proto = jobs_pb2.Job(
        name=job.name,
        state=jobs_pb2.JobState.ValueType(job.state),
        error=_parsed(status_pb2.Status, job.error, job),
        attempt_count=job.attempt_count,
        create_time=to_timestamp(job.create_time),
        update_time=to_timestamp(job.update_time),
        expire_time=None if job.expire_time is None else to_timestamp(job.expire_time),
    )
    if full:
        payload = _parsed(jobs_pb2.JobPayload, job.payload, job)
        if payload is not None:
            proto.payload.CopyFrom(payload)
        result = _parsed(jobs_pb2.JobResult, job.result, job)
        if result is not None:
            proto.result.CopyFrom(result)
    return proto


def payload_to_bytes(payload: jobs_pb2.JobPayload) -> bytes:
    """Serialises a payload such that equal ones have equal bytes."""
    return payload.SerializeToString(deterministic=True)


def submitted_event(item: OutboxJob) -> events_pb2.JobSubmitted:
    """Writes the message that a worker gets.

    Raises:
        DecodeError: the payload is broken.
    """
    return events_pb2.JobSubmitted(
        job_id=item.job_id,
        identity=events_pb2.Identity(tenant=tenant_name(item.tenant), user=item.user),
        payload=jobs_pb2.JobPayload.FromString(item.payload),
        create_time=to_timestamp(item.create_time),
    )


def message_id_of(job_id: str, create_time: datetime) -> str:
    """Returns what the ids of a job's messages start with; an id alone may be used again."""
    return f"{job_id}@{to_timestamp(create_time).ToMicroseconds()}"


def cancelled_event(job: Job, now: datetime) -> events_pb2.JobCancelled:
    """Writes the message that stops the worker of a job."""
    return events_pb2.JobCancelled(
        job_id=job.job_id,
        event_time=to_timestamp(now),
        job_create_time=to_timestamp(job.create_time),
    )


def started_from_event(event: events_pb2.JobStarted) -> Started:
    """Reads that a worker started a job."""
    return Started(event.attempt, job_create_time=_job_create_time(event))


def finished_from_event(event: events_pb2.JobFinished) -> Finished:
    """Reads how a worker finished a job; without a result it has failed."""
    if event.result.WhichOneof("work") is not None:
        outcome = Finished(event.attempt, result=event.result.SerializeToString())
    elif event.error.code:
        outcome = Finished(event.attempt, error=event.error.SerializeToString())
    else:
        missing = Internal("the worker reported neither a result nor an error", reason="INTERNAL")
        outcome = Finished(event.attempt, error=error_to_bytes(missing))
    return replace(outcome, job_create_time=_job_create_time(event))


def _job_create_time(event: events_pb2.JobStarted | events_pb2.JobFinished) -> datetime | None:
    if not event.HasField("job_create_time"):
        return None
    return event.job_create_time.ToDatetime(tzinfo=UTC)


def error_to_bytes(error: HeadraceError) -> bytes:
    """Serialises an error as `google.rpc.Status`, as jobs keep it."""
    return bytes(to_status(error).SerializeToString())


def reason_of(error: bytes) -> str:
    """Returns the reason in a serialised `google.rpc.Status`, empty if it has none."""
    info = error_details_pb2.ErrorInfo()
    try:
        for detail in status_pb2.Status.FromString(error).details:
            if detail.Unpack(info):
                return str(info.reason)
    except DecodeError:
        return ""
    return ""


def _parsed(message_type: type[M], data: bytes | None, job: Job) -> M | None:
    if data is None:
        return None
    try:
        return message_type.FromString(data)
    except DecodeError:
        _UNREADABLE.inc()
        _log.error("job cannot be read", job_id=job.job_id, type=message_type.__name__)
        return None
