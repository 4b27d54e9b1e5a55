"""Removes what is left of deleted jobs from files: the stream's and the database's."""

from __future__ import annotations

from collections.abc import Sequence

import structlog
from nats.js import JetStreamContext
from prometheus_client import Counter

from libs.bus.erasure import erase_if_present
from libs.bus.subjects import JOBS
from libs.errors import HeadraceError
from services.jobs.store import DeletedJob, JobStore
from services.jobs.wire import message_id_of

_log = structlog.get_logger()

_DELETED = Counter(
    "headrace_jobs_deleted", "Jobs that were deleted: expired or requested.", ["because"]
)


class Erasure:
    """Erases what was deleted. Failures are logged; the rest is done later."""

    def __init__(self, *, store: JobStore, js: JetStreamContext) -> None:
        self._store = store
        self._js = js
        self._log_has_more = False

    async def erase(self, deleted: Sequence[DeletedJob], *, because: str) -> None:
        """Erases the messages of deleted jobs, and the jobs themselves from the database's log.

        A message that cannot be erased now is erased when a worker takes it.
        """
        _DELETED.labels(because).inc(len(deleted))
        self._log_has_more |= bool(deleted)
        message_ids = {
            job.sequence: message_id_of(job.job_id, job.create_time)
            for job in deleted
            if job.sequence is not None
        }
        if message_ids:
            await erase_if_present(self._js, JOBS, message_ids)
        await self.finish()

    async def finish(self) -> None:
        """Retries what an earlier call could not do."""
        if not self._log_has_more:
            return
        try:
            self._log_has_more = not await self._store.erase_log()
        except HeadraceError as error:
            _log.warning("deleted jobs are still in the database's log", error=error)
