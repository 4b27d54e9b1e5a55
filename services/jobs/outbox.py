"""Publishes jobs from the outbox: immediately, and again until the bus has them."""

from __future__ import annotations

import asyncio
import enum

import structlog
from google.protobuf.message import DecodeError
from opentelemetry import context, propagate
from prometheus_client import Counter, Gauge

from libs.bus.publisher import Publisher
from libs.bus.subjects import JOB_SUBMITTED
from libs.clock import Clock
from libs.errors import HeadraceError, Internal, InvalidArgument
from services.jobs.outbox_store import OutboxJob, OutboxStore
from services.jobs.records import JobRecords
from services.jobs.wire import message_id_of, submitted_event

_log = structlog.get_logger()

_PUBLISHED = Counter("headrace_jobs_outbox_published", "Messages that the bus acknowledged.")
_UNSENT = Gauge("headrace_jobs_outbox_unsent", "Jobs to publish at the last check.")
_FAILURES = Counter(
    "headrace_jobs_outbox_failures", "Jobs that an unexpected error kept from being published."
)

# In memory at a time, with their payloads, and published at the same time.
BATCH_JOBS = 16


class _Unsent(enum.Enum):
    """Why a message is not in the stream."""

    NOT_YET = enum.auto()
    # The job is given up or waits for the reconciler: it delays no other job.
    NEVER = enum.auto()


class OutboxPublisher:
    """Publishes what `SubmitJob` wrote to the outbox."""

    def __init__(
        self,
        *,
        store: OutboxStore,
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
        """Looks at the outbox immediately."""
        self._work.set()

    async def run(self) -> None:
        """Publishes until it is cancelled; no error ends it.

        Jobs that another replica left in the outbox are found by polling.
        """
        while True:
            self._work.clear()
            try:
                while await self._publish_batch():
                    pass
            except HeadraceError as error:
                _log.warning("outbox waits", error=error)
            except Exception:  # noqa: BLE001  # the next round may succeed
                _FAILURES.inc()
                _log.exception("outbox failed")
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
        results = await asyncio.gather(*(self._publish(item) for item in batch))
        tried = [
            item for item, sent in zip(batch, results, strict=True) if sent is not _Unsent.NOT_YET
        ]
        sequences = {
            item.job_id: sent
            for item, sent in zip(batch, results, strict=True)
            if isinstance(sent, int)
        }
        await self._store.mark_sent(tried, self._clock.now(), sequences=sequences)
        _PUBLISHED.inc(len(sequences))
        return _Unsent.NOT_YET not in results and len(batch) == BATCH_JOBS

    async def _publish(self, item: OutboxJob) -> int | _Unsent:
        """Publishes one job; returns the number of its message in the stream.

        Runs in a task, so in a context, of its own.
        """
        context.attach(propagate.extract({"traceparent": item.traceparent}))
        try:
            return await self._try_to_publish(item)
        except HeadraceError as error:
            _log.warning("job not published yet", job_id=item.job_id, error=error)
            return _Unsent.NOT_YET
        except Exception:  # noqa: BLE001  # one job must not stop the others
            _FAILURES.inc()
            _log.exception("job not published", job_id=item.job_id)
            return _Unsent.NEVER

    async def _try_to_publish(self, item: OutboxJob) -> int | _Unsent:
        try:
            event = submitted_event(item)
            # A job that was lost is published as another message: the bus may know the first id.
            again = f".{item.publish_count}" if item.publish_count else ""
            message_id = message_id_of(item.job_id, item.create_time) + again
            return await self._publisher.publish(JOB_SUBMITTED, event, message_id=message_id)
        except DecodeError as error:
            _FAILURES.inc()
            _log.error("job has an invalid payload", job_id=item.job_id, error=error)
            broken = Internal("the stored payload cannot be read", reason="INTERNAL")
            await self._records.give_up(item.job_id, broken)
        except InvalidArgument as error:  # larger than the bus accepts: it never will
            await self._records.give_up(item.job_id, error)
        return _Unsent.NEVER
