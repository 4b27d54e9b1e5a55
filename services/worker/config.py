"""Settings of the worker."""

from __future__ import annotations

from pydantic import Field

from libs.config import BusSettings


class Settings(BusSettings):
    """Read from the environment, prefix `HEADRACE_`."""

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
