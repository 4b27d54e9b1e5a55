"""Settings of the worker."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from libs.config import ServiceSettings


class Settings(ServiceSettings):
    """Read from the environment, prefix `HEADRACE_`."""

    nats_url: str = Field(description="NATS, which carries jobs and their outcomes.")
    nats_credentials_file: Path | None = Field(
        default=None, description="USER:PASSWORD for the bus. Not set: it needs none."
    )
    inference_address: str = Field(description="The service that generates answers.")
    embedding_cache_address: str = Field(description="The service that computes embeddings.")
    jobs_address: str = Field(description="The service that has the records of jobs.")
    cost_address: str = Field(description="The service that has the prices.")
    worker_concurrency: int = Field(
        default=4, ge=1, le=1024, description="Jobs that run at the same time."
    )
    job_timeout_seconds: float = Field(default=600.0, gt=0, description="The limit of an attempt.")
    max_result_bytes: int = Field(
        default=6 * 1024 * 1024, ge=1, description="A job with a larger result fails."
    )
