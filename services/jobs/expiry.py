"""Deletes jobs that have expired, with their payloads and results."""

from __future__ import annotations

from datetime import timedelta

import structlog
from prometheus_client import Counter

from libs.clock import Clock
from libs.errors import HeadraceError
from services.jobs.erasure import Erasure
from services.jobs.store import JobStore

_log = structlog.get_logger()

_FAILURES = Counter("headrace_jobs_expiry_failures", "Rounds of deletion that failed.")

# Of one transaction. Each row may have megabytes, and SQLite has one writer at a time.
BATCH_JOBS = 50
BATCH_PAUSE_SECONDS = 0.05


class ExpiredJobs:
    """Looks regularly for jobs to delete.

    Args:
        store: the records.
        erasure: erases what was deleted.
        clock: the time.
        interval_seconds: between two rounds.
        retention: how long jobs that have ended are kept, for those that an earlier version ended
            without a time to expire.
    """

    def __init__(
        self,
        *,
        store: JobStore,
        erasure: Erasure,
        clock: Clock,
        interval_seconds: float,
        retention: timedelta,
    ) -> None:
        self._store = store
        self._erasure = erasure
        self._clock = clock
        self._interval_seconds = interval_seconds
        self._retention = retention

    async def run(self) -> None:
        """Deletes until it is cancelled; no error ends it."""
        while True:
            try:
                await self.delete()
            except HeadraceError as error:
                _FAILURES.inc()
                _log.warning("expired jobs not deleted yet", error=error)
            except Exception:  # noqa: BLE001  # the next round may succeed
                _FAILURES.inc()
                _log.exception("expired jobs not deleted")
            await self._clock.sleep(self._interval_seconds)

    async def delete(self) -> None:
        """Deletes all jobs that have expired, some at a time.

        Raises:
            Unavailable: the database does not answer.
        """
        while await self._store.fill_in_expire_times(self._retention, limit=BATCH_JOBS):
            await self._clock.sleep(BATCH_PAUSE_SECONDS)
        await self._erasure.finish()
        while deleted := await self._store.delete_expired(self._clock.now(), limit=BATCH_JOBS):
            _log.info("expired jobs deleted", job_count=len(deleted))
            await self._erasure.erase(deleted, because="expired")
            await self._clock.sleep(BATCH_PAUSE_SECONDS)
