"""Subjects of the bus, the streams that store them, and their consumers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import Message
from headrace.events.v1 import events_pb2

USAGE_RECORDED: Final = "headrace.inference.usage.recorded"
USAGE_BATCH_RECORDED: Final = "headrace.inference.usage.batch_recorded"
JOB_SUBMITTED: Final = "headrace.jobs.job.submitted"
JOB_CANCELLED: Final = "headrace.jobs.job.cancelled"
JOB_STARTED: Final = "headrace.worker.job.started"
JOB_FINISHED: Final = "headrace.worker.job.finished"

MESSAGE_TYPES: Final[Mapping[str, type[Message]]] = {
    USAGE_RECORDED: events_pb2.UsageRecorded,
    USAGE_BATCH_RECORDED: events_pb2.UsageBatchRecorded,
    JOB_SUBMITTED: events_pb2.JobSubmitted,
    JOB_STARTED: events_pb2.JobStarted,
    JOB_FINISHED: events_pb2.JobFinished,
}
# Sent to all processes that listen at that moment; not stored in a stream.
BROADCAST_TYPES: Final[Mapping[str, type[Message]]] = {JOB_CANCELLED: events_pb2.JobCancelled}

MEBIBYTE: Final = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A work queue on disk: a message is removed when its consumer has acknowledged it.

    A full stream refuses new messages (`discard: new`); it never drops acknowledged ones.

    Attributes:
        duplicate_window_seconds: a message ID is stored once within this time. This is a cache, not
            a guarantee: consumers must detect duplicates themselves.
        content_subjects: subjects whose messages carry what users wrote or models answered. When
            they are done they are overwritten on the disk, not only removed.
    """

    name: str
    subjects: tuple[str, ...]
    max_messages: int
    max_bytes: int
    duplicate_window_seconds: float = 120.0
    content_subjects: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """A durable consumer of a stream; all replicas of a service share it.

    Attributes:
        max_attempts: number of deliveries after which a message is given up; None: never.
        ack_wait_seconds: time without a heartbeat after which a message is delivered to another
            worker.
        max_in_flight: most unacknowledged messages, of all replicas together.
        retry_delays_seconds: delays after the first, second, … failure; the last one repeats.
    """

    name: str
    stream: Stream
    max_attempts: int | None
    ack_wait_seconds: float = 10.0
    max_in_flight: int = 1024
    retry_delays_seconds: tuple[float, ...] = (0.2, 1.0, 5.0, 15.0, 30.0)


USAGE = Stream(
    name="HEADRACE_USAGE",
    subjects=(USAGE_RECORDED, USAGE_BATCH_RECORDED),
    max_messages=1_000_000,
    max_bytes=512 * MEBIBYTE,
)
JOBS = Stream(
    name="HEADRACE_JOBS",
    subjects=(JOB_SUBMITTED,),
    max_messages=100_000,
    max_bytes=1024 * MEBIBYTE,
    content_subjects=frozenset({JOB_SUBMITTED}),
)
OUTCOMES = Stream(
    name="HEADRACE_OUTCOMES",
    subjects=(JOB_STARTED, JOB_FINISHED),
    max_messages=400_000,
    max_bytes=1024 * MEBIBYTE,
    content_subjects=frozenset({JOB_FINISHED}),
)
STREAMS: Final = (USAGE, JOBS, OUTCOMES)

# The ledger and the job records retry their messages without limit.
COST = Consumer(name="cost", stream=USAGE, max_attempts=None)
WORKER = Consumer(name="worker", stream=JOBS, max_attempts=8)
JOB_RECORDS = Consumer(name="jobs", stream=OUTCOMES, max_attempts=None)
