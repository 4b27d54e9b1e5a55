"""Settings of the jobs service."""

from __future__ import annotations

from pydantic import Field

from libs.config import ServiceSettings


class Settings(ServiceSettings):
    """Read from the environment, prefix `HEADRACE_`."""

    nats_url: str = Field(description="Where jobs go and outcomes come from.")
    nats_monitoring_url: str | None = Field(
        default=None, description="Where to see that the bus writes before it acknowledges."
    )
    database_url: str | None = Field(
        default=None, description="Job records and outbox. Unset: SQLite in the home."
    )
    max_waiting_jobs: int = Field(default=10_000, ge=1, description="More are refused.")
    max_result_bytes: int = Field(
        default=6 * 1024 * 1024, ge=1, description="A job with a larger result has failed."
    )
    outbox_poll_seconds: float = Field(
        default=1.0, gt=0, description="How often to look for what another replica left."
    )
    outcome_concurrency: int = Field(
        default=32, ge=1, le=1024, description="Outcomes in hand at a time."
    )
    reconcile_seconds: float = Field(
        default=30.0, gt=0, description="How often records are compared with the bus."
    )
    job_lost_after_seconds: float = Field(
        default=300.0, gt=0, description="A job that has changed since is not taken for lost."
    )
    max_job_publishes: int = Field(
        default=5, ge=1, description="A job that the bus lost so often has failed."
    )
    watch_poll_seconds: float = Field(
        default=1.0, gt=0, description="How often to look for changes that another replica made."
    )
    max_job_watchers: int = Field(default=1000, ge=1, description="WatchJob streams at a time.")
