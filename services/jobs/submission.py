"""Accepts jobs: each is durable, is accepted once, and is refused if too many wait."""

from __future__ import annotations

import structlog
from headrace.jobs.v1 import jobs_pb2
from opentelemetry import propagate
from prometheus_client import Counter

from libs.clock import Clock
from libs.errors import AlreadyExists, ResourceExhausted
from libs.ids import check_uuid, uuid7
from libs.rpc.identity import Identity
from services.jobs.domain import Job
from services.jobs.outbox import OutboxPublisher
from services.jobs.payload import checked_payload
from services.jobs.store import JobStore, QueueFullError, WaitingLimits
from services.jobs.wire import check_no_batch, payload_to_bytes

_log = structlog.get_logger()

_SUBMITTED = Counter("headrace_jobs_submitted", "Jobs accepted, by kind of work.", ["work"])
_REFUSED = Counter("headrace_jobs_refused", "Jobs refused because too many wait.")

FULL_RETRY_AFTER_SECONDS = 5.0


class Submission:
    """Accepts jobs."""

    def __init__(
        self, *, store: JobStore, outbox: OutboxPublisher, clock: Clock, limits: WaitingLimits
    ) -> None:
        self._store = store
        self._outbox = outbox
        self._clock = clock
        self._limits = limits

    async def submit(self, request: jobs_pb2.SubmitJobRequest, identity: Identity) -> Job:
        """Returns the job, old or new, when it is on disk.

        Raises:
            InvalidArgument: the request is invalid.
            PermissionDenied: the token does not allow its priority.
            AlreadyExists: a job with this id has another payload or another tenant.
            ResourceExhausted: too many jobs wait.
        """
        check_no_batch(request.parent)
        job_id = check_uuid(request.job_id, field="job_id") if request.job_id else None
        job_id = job_id or uuid7(self._clock)
        payload = checked_payload(request.payload, job_id)
        if payload.WhichOneof("work") == "generate":
            identity.allow_priority(payload.generate.priority)
        now = self._clock.now()
        wanted = Job(
            job_id=job_id,
            tenant=identity.tenant,
            user=identity.user,
            payload=payload_to_bytes(payload),
            create_time=now,
            update_time=now,
        )
        job = await self._stored(wanted)
        if not job.same_request(wanted):
            raise AlreadyExists.of_resource(wanted.name)
        if job is wanted:
            work = payload.WhichOneof("work")
            _SUBMITTED.labels(work).inc()
            _log.info("job accepted", job_id=job_id, tenant=job.tenant, work=work)
            self._outbox.wake()
        return job

    async def _stored(self, job: Job) -> Job:
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        try:
            return await self._store.submit(
                job, traceparent=carrier.get("traceparent", ""), limits=self._limits
            )
        except QueueFullError as error:
            _REFUSED.inc()
            whose = " of this tenant" if error.of_tenant else ""
            raise ResourceExhausted.of_queue(
                "jobs",
                f"{error.limit} jobs{whose} wait already, which is the limit",
                limit=error.limit,
                retry_after_seconds=FULL_RETRY_AFTER_SECONDS,
            ) from error
