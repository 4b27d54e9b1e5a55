"""Stores what workers report on the bus."""

from __future__ import annotations

from headrace.events.v1 import events_pb2

from libs.bus.delivery import Delivery, PoisonMessage
from services.jobs.domain import Outcome
from services.jobs.records import JobRecords
from services.jobs.wire import finished_from_event, started_from_event

JobEvent = events_pb2.JobStarted | events_pb2.JobFinished


class OutcomeConsumer:
    """Handles the events of workers. An event is done when the record has it."""

    def __init__(self, records: JobRecords) -> None:
        self._records = records

    async def handle(self, delivery: Delivery[JobEvent]) -> None:
        """Stores one event.

        Raises:
            PoisonMessage: it has no job id.
            Unavailable: the database does not answer; the event is delivered again.
        """
        event = delivery.message
        if not event.job_id:
            raise PoisonMessage("job_id must be given")
        outcome: Outcome
        if isinstance(event, events_pb2.JobStarted):
            outcome = started_from_event(event)
        else:
            outcome = finished_from_event(event)
        await self._records.take(event.job_id, outcome)
