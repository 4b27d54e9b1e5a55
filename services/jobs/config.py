"""Settings of the jobs service."""

from __future__ import annotations

from pydantic import Field

from libs.config import DurableBusSettings
from services.jobs.store import WaitingLimits

_DAY_SECONDS = 24 * 60 * 60


class Settings(DurableBusSettings):
    """Read from the environment, prefix `HEADRACE_`."""

    database_url: str | None = Field(
        default=None, description="Job records and outbox. Unset: SQLite in the home."
    )
    max_waiting_jobs: int = Field(
        default=10_000, ge=1, description="Jobs that may wait; further ones are refused."
    )
    max_waiting_jobs_per_tenant: int | None = Field(
        default=None,
        ge=1,
        description="Jobs of one tenant that may wait. Unset: half of MAX_WAITING_JOBS.",
    )
    max_result_bytes: int = Field(
        default=6 * 1024 * 1024, ge=1, description="A job with a larger result fails."
    )
    job_retention_seconds: float = Field(
        default=7 * _DAY_SECONDS,
        gt=0,
        le=100 * 366 * _DAY_SECONDS,
        description="How long a job is kept after it has ended.",
    )
    job_expiry_seconds: float = Field(
        default=60.0, gt=0, description="How often expired jobs are deleted."
    )
    outbox_poll_seconds: float = Field(
        default=1.0, gt=0, description="How often to look for jobs that another replica left."
    )
    outcome_concurrency: int = Field(
        default=32, ge=1, le=1024, description="Outcomes that are stored at the same time."
    )
    reconcile_seconds: float = Field(
        default=30.0, gt=0, description="How often records are compared with the bus."
    )
    job_lost_after_seconds: float = Field(
        default=300.0, gt=0, description="A job that changed more recently is not lost."
    )
    max_job_publishes: int = Field(
        default=5, ge=1, description="A job that the bus loses so often fails."
    )
    watch_poll_seconds: float = Field(
        default=1.0, gt=0, description="How often to look for changes that another replica made."
    )
    max_job_watchers: int = Field(
        default=1000,
        ge=1,
        description="WatchJob streams at the same time. A tenant alone gets half of them, n busy "
        "tenants get 1/(1 + n) each.",
    )

    def waiting_limits(self) -> WaitingLimits:
        """Returns how many jobs may wait."""
        total = self.max_waiting_jobs
        return WaitingLimits(total, self.max_waiting_jobs_per_tenant or (total + 1) // 2)
