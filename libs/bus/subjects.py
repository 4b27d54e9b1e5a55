"""What is published on the bus: subjects, the streams that store them, and their consumers."""

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
# Sent to every process that listens at that moment; in no stream.
BROADCAST_TYPES: Final[Mapping[str, type[Message]]] = {JOB_CANCELLED: events_pb2.JobCancelled}

MEBIBYTE: Final = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A work queue on disk: a message leaves it when its consumer has acknowledged it.

    A full stream refuses new messages (`discard: new`); it never drops what it acknowledged.

    Attributes:
        duplicate_window_seconds: a message id that was seen so long ago is not stored again. A
            cache, not a guarantee: consumers keep the record of what they have done.
    """

    name: str
    subjects: tuple[str, ...]
    max_messages: int
    max_bytes: int
    duplicate_window_seconds: float = 120.0


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """A durable consumer of a stream; all replicas of a service share it.

    Attributes:
        max_attempts: deliveries after which a message is given up; None: never, for what must not
            be lost however long it takes.
        ack_wait_seconds: a message whose worker has been silent so long goes to another one.
        max_in_flight: messages delivered and not acknowledged, of all replicas together.
        retry_delays_seconds: waits after the first, second, … failed attempt; the last one repeats.
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
)
OUTCOMES = Stream(
    name="HEADRACE_OUTCOMES",
    subjects=(JOB_STARTED, JOB_FINISHED),
    max_messages=400_000,
    max_bytes=1024 * MEBIBYTE,
)
STREAMS: Final = (USAGE, JOBS, OUTCOMES)

# The ledger and the job records take what comes, however often they have to try.
COST = Consumer(name="cost", stream=USAGE, max_attempts=None)
WORKER = Consumer(name="worker", stream=JOBS, max_attempts=8)
JOB_RECORDS = Consumer(name="jobs", stream=OUTCOMES, max_attempts=None)
