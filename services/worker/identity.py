"""In whose name a job runs."""

from __future__ import annotations

import uuid

from google.protobuf.timestamp_pb2 import Timestamp
from headrace.events.v1 import events_pb2

from libs.chat.request import MAX_PRIORITY
from libs.rpc.identity import Identity
from libs.rpc.names import tenant_id

_SCOPES = frozenset({"infer"})


def identity_of_job(job: events_pb2.JobSubmitted) -> Identity:
    """Returns who submitted a job, with the scope that its calls need.

    However often the job runs, its usage has one id: the ledger books it once.
    """
    tenant = tenant_id(job.identity.tenant)
    return Identity(
        tenant,
        job.identity.user,
        _SCOPES,
        max_priority=MAX_PRIORITY,  # `jobs` has checked what the submitter's token allows
        usage_id=_usage_id(job),
    )


def create_time_of(job: events_pb2.JobSubmitted) -> Timestamp | None:
    """Returns when a job was accepted; earlier versions did not record it.

    Clients choose the ids of jobs, and may choose one again when its job is deleted.
    """
    return job.create_time if job.HasField("create_time") else None


def _usage_id(job: events_pb2.JobSubmitted) -> str:
    accepted = create_time_of(job)
    time = "" if accepted is None else f"@{accepted.ToJsonString()}"
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"headrace:jobs/{job.job_id}{time}"))
