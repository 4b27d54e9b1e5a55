"""The users of the bus and what each may do: only what its service does.

A message that is published is believed by those who consume it, and a job has a prompt in it. So a
process that is taken over must not read or write more on the bus than its own work. Subjects are
as far as this goes: a worker may publish the outcome of any job, also of one that it did not get,
and `inference`, `embedding_cache` and `worker` may publish any usage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from libs.bus.durability import SERVER_CONFIG_SUBJECT
from libs.bus.inboxes import inbox_prefix
from libs.bus.subjects import (
    COST,
    JOB_CANCELLED,
    JOB_FINISHED,
    JOB_RECORDS,
    JOB_STARTED,
    JOB_SUBMITTED,
    JOBS,
    OUTCOMES,
    STREAMS,
    USAGE,
    USAGE_BATCH_RECORDED,
    USAGE_RECORDED,
    WORKER,
    Consumer,
    Stream,
)

# The user of the system account; it may only ask how the server is configured.
SYSTEM_USER = "monitor"
_API = "$JS.API"


@dataclass(frozen=True, kw_only=True)
class Access:
    """What a service does on the bus.

    Attributes:
        publishes: the subjects that it publishes.
        listens: broadcasts that it receives.
        consumes: the consumer whose messages it gets.
        owns: the streams whose settings it may change.
        reads: the streams whose state it reads.
        reads_messages: the streams whose messages it may read without consuming them.
        erases: the streams whose messages it may remove and overwrite.
    """

    publishes: Sequence[str] = ()
    listens: Sequence[str] = ()
    consumes: Consumer | None = None
    owns: Sequence[Stream] = ()
    reads: Sequence[Stream] = ()
    reads_messages: Sequence[Stream] = ()
    erases: Sequence[Stream] = ()

    def streams(self) -> list[Stream]:
        """Returns the streams that it needs, which it creates where they are missing."""
        return [
            stream
            for stream in STREAMS
            if set(stream.subjects) & set(self.publishes)
            or stream in self.owns
            or (self.consumes is not None and self.consumes.stream == stream)
        ]


_USAGE = (USAGE_RECORDED, USAGE_BATCH_RECORDED)
USERS: Mapping[str, Access] = MappingProxyType(
    {
        "inference": Access(publishes=_USAGE),
        "embedding_cache": Access(publishes=_USAGE),
        "cost": Access(consumes=COST, owns=[USAGE], reads=[USAGE]),
        "jobs": Access(
            publishes=(JOB_SUBMITTED, JOB_CANCELLED),
            consumes=JOB_RECORDS,
            owns=[JOBS, OUTCOMES],
            reads=[JOBS, OUTCOMES],
            reads_messages=[JOBS],
            erases=[JOBS, OUTCOMES],
        ),
        "worker": Access(
            publishes=(JOB_STARTED, JOB_FINISHED, *_USAGE),
            listens=(JOB_CANCELLED,),
            consumes=WORKER,
            erases=[JOBS],
        ),
    }
)


def permissions(user: str) -> dict[str, list[str]]:
    """Returns the subjects that a user may publish and subscribe, as NATS's configuration has them.

    All others are refused. Each user has its own inboxes: a user that could subscribe to those of
    others would receive the messages that are delivered to them.
    """
    access = USERS[user]
    publish = list(access.publishes)
    publish += [f"{_API}.STREAM.CREATE.{stream.name}" for stream in access.streams()]
    publish += [f"{_API}.STREAM.UPDATE.{stream.name}" for stream in access.owns]
    publish += [f"{_API}.STREAM.INFO.{stream.name}" for stream in access.reads]
    publish += [f"{_API}.STREAM.MSG.GET.{stream.name}" for stream in access.reads_messages]
    publish += [f"{_API}.STREAM.MSG.DELETE.{stream.name}" for stream in access.erases]
    if access.consumes is not None:
        consumer = f"{access.consumes.stream.name}.{access.consumes.name}"
        publish += [
            f"{_API}.CONSUMER.CREATE.{consumer}",
            f"{_API}.CONSUMER.MSG.NEXT.{consumer}",
            f"$JS.ACK.{consumer}.>",
        ]
    return {"publish": publish, "subscribe": [*access.listens, f"{inbox_prefix(user)}.>"]}


def system_permissions() -> dict[str, list[str]]:
    """Returns the same for the user of the system account."""
    return {
        "publish": [SERVER_CONFIG_SUBJECT],
        "subscribe": [f"{inbox_prefix(SYSTEM_USER)}.>"],
    }
