"""In whose name a job runs."""

from __future__ import annotations

import uuid

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


def _usage_id(job: events_pb2.JobSubmitted) -> str:
    # Derived: clients choose the ids of jobs, and may choose one again after its job has expired.
    time = f"@{job.create_time.ToJsonString()}" if job.HasField("create_time") else ""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"headrace:jobs/{job.job_id}{time}"))
