"""Settings of the worker."""

from __future__ import annotations

from pydantic import Field

from libs.config import ServiceSettings


class Settings(ServiceSettings):
    """Read from the environment, prefix `HEADRACE_`."""

    nats_url: str = Field(description="Where jobs come from and outcomes go.")
    inference_address: str = Field(description="Who generates.")
    embedding_cache_address: str = Field(description="Who embeds.")
    jobs_address: str = Field(description="Who knows whether a job has ended.")
    worker_concurrency: int = Field(default=4, ge=1, le=1024, description="Jobs at a time.")
    job_timeout_seconds: float = Field(default=600.0, gt=0, description="For one attempt.")
    max_result_bytes: int = Field(
        default=6 * 1024 * 1024, ge=1, description="A job with a larger result fails."
    )
