"""From the outbox to the bus: at once, and again until the bus has it."""

from __future__ import annotations

import asyncio

import structlog
from headrace.events.v1 import events_pb2
from headrace.jobs.v1 import jobs_pb2
from opentelemetry import context, propagate
from prometheus_client import Counter, Gauge

from libs.bus.publisher import Publisher
from libs.bus.subjects import JOB_SUBMITTED
from libs.clock import Clock
from libs.errors import HeadraceError, InvalidArgument
from services.jobs.domain import Failure
from services.jobs.records import JobRecords
from services.jobs.store import JobStore, OutboxJob

_log = structlog.get_logger()

_PUBLISHED = Counter("headrace_jobs_outbox_published", "Messages that the bus acknowledged.")
_UNSENT = Gauge("headrace_jobs_outbox_unsent", "Jobs found to publish at the last look.")

# In memory at a time, with their payloads, and on their way at the same time.
BATCH_JOBS = 16


class OutboxPublisher:
    """Publishes what `SubmitJob` left in the outbox."""

    def __init__(
        self,
        *,
        store: JobStore,
        records: JobRecords,
        publisher: Publisher,
        clock: Clock,
        poll_seconds: float,
    ) -> None:
        self._store = store
        self._records = records
        self._publisher = publisher
        self._clock = clock
        self._poll_seconds = poll_seconds
        self._work = asyncio.Event()

    def wake(self) -> None:
        """Looks at once."""
        self._work.set()

    async def run(self) -> None:
        """Publishes until it is cancelled. What another replica left behind is found by polling."""
        while True:
            self._work.clear()
            try:
                while await self._publish_batch():
                    pass
            except HeadraceError as error:
                _log.warning("outbox waits", error=repr(error))
            try:
                async with asyncio.timeout(self._poll_seconds):
                    await self._work.wait()
            except TimeoutError:
                pass

    async def _publish_batch(self) -> bool:
        """Publishes some; returns whether there may be more that can be published now."""
        batch = await self._store.unsent(limit=BATCH_JOBS)
        _UNSENT.set(len(batch))
        if not batch:
            return False
        done = await asyncio.gather(*(self._publish(item) for item in batch))
        sent = [item for item, stored in zip(batch, done, strict=True) if stored]
        await self._store.mark_sent(sent, self._clock.now())
        _PUBLISHED.inc(len(sent))
        return all(done) and len(batch) == BATCH_JOBS

    async def _publish(self, item: OutboxJob) -> bool:
        """Returns whether the bus has the message. Runs in a task, so in a context, of its own."""
        job = item.job
        event = events_pb2.JobSubmitted(
            job_id=job.job_id,
            identity=events_pb2.Identity(tenant=job.tenant, user=job.user),
            payload=jobs_pb2.JobPayload.FromString(job.payload),
        )
        # One that was found lost is another message: the stream may still know the first id.
        again = f".{item.publish_count}" if item.publish_count else ""
        context.attach(propagate.extract({"traceparent": item.traceparent}))
        try:
            await self._publisher.publish(JOB_SUBMITTED, event, message_id=job.job_id + again)
        except InvalidArgument as error:  # larger than the bus takes: it never will
            failure = Failure(error.code, error.reason, error.message)
            await self._records.give_up(job.job_id, failure)
            return False
        except HeadraceError as error:
            _log.warning("job not published yet", job_id=job.job_id, error=repr(error))
            return False
        return True
