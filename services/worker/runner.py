"""Runs one job, from its message to its outcome."""

from __future__ import annotations

import structlog
from google.protobuf.timestamp_pb2 import Timestamp
from headrace.events.v1 import events_pb2
from headrace.jobs.v1 import jobs_pb2
from prometheus_client import Counter

from libs.bus.delivery import Delivery, PoisonMessage
from libs.bus.publisher import Publisher
from libs.bus.subjects import JOB_FINISHED, JOB_STARTED
from libs.clock import Clock
from libs.errors import (
    Cancelled,
    DeadlineExceeded,
    HeadraceError,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from libs.rpc.names import tenant_id
from libs.rpc.status import to_status
from libs.timestamps import to_timestamp
from services.worker.billing import CancelledUsage
from services.worker.cancellations import Cancellation, Cancellations, JobCancelledError
from services.worker.execution import Execution, Progress, ResultTooLarge
from services.worker.identity import create_time_of
from services.worker.records import JobRecords

_log = structlog.get_logger()

_ATTEMPTS = Counter(
    "headrace_worker_attempts",
    "Deliveries by outcome: succeeded, failed, postponed, cancelled or needless.",
    ["outcome"],
)

# A result is not lost in an outage of the bus that is shorter than this.
FINISHED_TIMEOUT_SECONDS = 60.0

JobDelivery = Delivery[events_pb2.JobSubmitted]

# Errors after which the next attempt may succeed.
_TEMPORARY = (Unavailable, ResourceExhausted, DeadlineExceeded, Cancelled)


class JobRunner:
    """Runs jobs. A job's message is done when the bus has its `JobFinished`.

    A job may run twice if its worker dies late. The jobs service takes the first outcome and
    ignores the second.
    """

    def __init__(
        self,
        *,
        execution: Execution,
        records: JobRecords,
        cancellations: Cancellations,
        cancelled_usage: CancelledUsage,
        publisher: Publisher,
        clock: Clock,
    ) -> None:
        self._execution = execution
        self._records = records
        self._cancellations = cancellations
        self._cancelled_usage = cancelled_usage
        self._publisher = publisher
        self._clock = clock

    async def handle(self, delivery: JobDelivery) -> None:
        """Runs one job.

        Raises:
            HeadraceError: the next attempt may succeed; the bus delivers the job again.
            PoisonMessage: the message has no job id.
        """
        job = delivery.message
        if not job.job_id:
            raise PoisonMessage("job_id must be given")
        # Before the record is read, so that no cancellation falls between the two.
        with self._cancellations.of(job.job_id, create_time_of(job)) as cancellation:
            if await self._records.has_ended(job, attempt=delivery.attempt):
                _ATTEMPTS.labels("needless").inc()
                return
            await self._run(delivery, cancellation)

    async def give_up(self, delivery: JobDelivery) -> None:
        """Fails a job after its last attempt."""
        error = delivery.error
        if not isinstance(error, HeadraceError):
            why = "failed" if error else "died"
            error = Internal(f"its worker {why} in every attempt", reason="INTERNAL")
        await self._report_failed(delivery, error)

    async def _run(self, delivery: JobDelivery, cancellation: Cancellation) -> None:
        await self._report_started(delivery)
        job, progress = delivery.message, Progress()
        try:
            result = await cancellation.run(lambda: self._execution.run(job, progress))
        except JobCancelledError:
            await self._cancelled_usage.record(job, progress)
            _ATTEMPTS.labels("cancelled").inc()
            _log.info("job cancelled", job_id=job.job_id, token_count=progress.token_count)
        except HeadraceError as error:
            if isinstance(error, _TEMPORARY) and not isinstance(error, ResultTooLarge):
                _ATTEMPTS.labels("postponed").inc()
                raise
            await self._report_failed(delivery, error)
        else:
            await self._report_succeeded(delivery, result)

    async def _report_started(self, delivery: JobDelivery) -> None:
        job, attempt = delivery.message, delivery.attempt
        await self._publisher.publish(
            JOB_STARTED,
            events_pb2.JobStarted(
                job_id=job.job_id,
                attempt=attempt,
                event_time=self._now(),
                job_create_time=create_time_of(job),
            ),
            message_id=f"{delivery.message_id}.started.{attempt}",
        )

    async def _report_succeeded(self, delivery: JobDelivery, result: jobs_pb2.JobResult) -> None:
        event = self._finished(delivery)
        event.result.CopyFrom(result)
        try:
            await self._report_finished(delivery, event)
        except InvalidArgument as error:  # larger than the bus accepts
            await self._report_failed(delivery, error)
        else:
            _ATTEMPTS.labels("succeeded").inc()

    async def _report_failed(self, delivery: JobDelivery, error: HeadraceError) -> None:
        event = self._finished(delivery)
        event.error.CopyFrom(to_status(error))
        await self._report_finished(delivery, event)
        _ATTEMPTS.labels("failed").inc()
        _log.warning(
            "job failed",
            job_id=delivery.message.job_id,
            tenant=tenant_id(delivery.message.identity.tenant),
            code=error.code,
            reason=error.reason,
        )

    def _finished(self, delivery: JobDelivery) -> events_pb2.JobFinished:
        job = delivery.message
        return events_pb2.JobFinished(
            job_id=job.job_id,
            attempt=delivery.attempt,
            event_time=self._now(),
            job_create_time=create_time_of(job),
        )

    async def _report_finished(self, delivery: JobDelivery, event: events_pb2.JobFinished) -> None:
        # Of a message that two workers finish, the stream keeps the first outcome.
        await self._publisher.publish(
            JOB_FINISHED,
            event,
            message_id=f"{delivery.message_id}.finished",
            timeout_seconds=FINISHED_TIMEOUT_SECONDS,
        )

    def _now(self) -> Timestamp:
        return to_timestamp(self._clock.now())
