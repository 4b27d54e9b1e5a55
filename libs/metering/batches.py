"""Publishes usage records: those that come while a message is being stored share the next one."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from google.protobuf.message import Message
from headrace.events.v1 import events_pb2
from opentelemetry import context, trace
from prometheus_client import Histogram

from libs.background import start_task
from libs.bus.publisher import Publisher
from libs.bus.subjects import USAGE_BATCH_RECORDED, USAGE_RECORDED
from libs.errors import HeadraceError, Internal, ResourceExhausted, Unavailable

_BATCH_RECORDS = Histogram(
    "headrace_metering_batch_records",
    "Usage records in one message.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)

# A record has a few hundred bytes; the bus takes messages of 8 MiB.
MAX_BATCH_RECORDS = 256
# Records of cancelled callers wait, too, at most as long as a record may take.
MAX_WAITING_RECORDS = 100_000
MIN_TIMEOUT_SECONDS = 0.05
# After a batch, the next records are awaited so long: messages cost more than records.
GATHER_SECONDS = 0.001
FULL_RETRY_AFTER_SECONDS = 1.0


@dataclass(eq=False, slots=True)
class _Waiting:
    record: events_pb2.UsageRecorded
    deadline_seconds: float
    trace: context.Context
    done: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def settle(self, error: Exception | None = None) -> None:
        if self.done.done():  # its caller was cancelled
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)

    @property
    def is_sampled(self) -> bool:
        return trace.get_current_span(self.trace).get_span_context().trace_flags.sampled


class UsageBatches:
    """Publishes records by group commit: one that comes alone is published immediately, as itself.

    A record is published even when its caller is cancelled. After a failure a record may be stored
    twice, in two messages; the ledger books it once.
    """

    def __init__(self, publisher: Publisher, *, timeout_seconds: float) -> None:
        self._publisher = publisher
        self._timeout_seconds = timeout_seconds
        self._waiting: deque[_Waiting] = deque()
        self._publishing: asyncio.Task[None] | None = None

    async def publish(self, record: events_pb2.UsageRecorded) -> None:
        """Returns when the record is on disk.

        Raises:
            Unavailable: the bus did not acknowledge in time.
            ResourceExhausted: the stream of usage events is full, or too many records wait.
        """
        if len(self._waiting) >= MAX_WAITING_RECORDS:
            raise ResourceExhausted.of_queue(
                "usage",
                "too many usage records wait for the bus",
                limit=MAX_WAITING_RECORDS,
                retry_after_seconds=FULL_RETRY_AFTER_SECONDS,
            )
        deadline = asyncio.get_running_loop().time() + self._timeout_seconds
        mine = _Waiting(record, deadline, context.get_current())
        self._waiting.append(mine)
        if self._publishing is None:
            self._publishing = start_task(self._publish_all(), name="usage batches")
        await mine.done

    async def drain(self) -> None:
        """Returns when no record waits any more, those of cancelled callers included."""
        if self._publishing is not None:
            await asyncio.wait([self._publishing])

    async def _publish_all(self) -> None:
        try:
            while self._waiting:
                batch = list(islice(self._waiting, MAX_BATCH_RECORDS))
                for again in await self._publish_batch(batch):
                    self._waiting.append(again)
                for _ in batch:
                    self._waiting.popleft()
                if len(batch) > 1:
                    await asyncio.sleep(GATHER_SECONDS)
        finally:
            self._publishing = None
            if self._waiting:  # this task failed or was cancelled: no caller may wait indefinitely
                error = Internal("usage was not recorded", reason="INTERNAL")
                _settle(self._waiting, error)
                self._waiting.clear()

    async def _publish_batch(self, batch: list[_Waiting]) -> list[_Waiting]:
        """Publishes records and settles them; returns those with time for another try."""
        now = asyncio.get_running_loop().time
        first = batch[0]
        _BATCH_RECORDS.observe(len(batch))
        try:
            subject, message, message_id = _message(batch)
            await self._publisher.publish(
                subject,
                message,
                message_id=message_id,
                timeout_seconds=max(MIN_TIMEOUT_SECONDS, first.deadline_seconds - now()),
                # A message has one trace: that of a sampled record, if there is one.
                context=next((each for each in batch if each.is_sampled), first).trace,
            )
        except Unavailable as error:
            late = now() + MIN_TIMEOUT_SECONDS
            for each in batch:
                if each.deadline_seconds <= late:
                    each.settle(error)
            return [each for each in batch if each.deadline_seconds > late]
        except HeadraceError as error:
            _settle(batch, error)
        except Exception as error:  # noqa: BLE001  # no caller may wait indefinitely
            _settle(batch, Internal(f"usage was not recorded: {error!r}", reason="INTERNAL"))
        else:
            _settle(batch, None)
        return []


def _settle(batch: Iterable[_Waiting], error: Exception | None) -> None:
    for each in batch:
        each.settle(error)


def _message(batch: list[_Waiting]) -> tuple[str, Message, str]:
    """Returns subject, message and id.

    A batch has its own id: with the id of a record, which may be stored already, the bus would
    drop the batch as a duplicate, and the other records with it.
    """
    if len(batch) == 1:
        record = batch[0].record
        return USAGE_RECORDED, record, record.usage_id
    records = [each.record for each in batch]
    batch_id = str(uuid.uuid4())
    return USAGE_BATCH_RECORDED, events_pb2.UsageBatchRecorded(records=records), batch_id
