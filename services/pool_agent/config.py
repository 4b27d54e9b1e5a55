"""Settings of the pool agent."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from libs.config import ServiceSettings


class Settings(ServiceSettings):
    """Read from the environment, prefix `HEADRACE_`."""

    registry_address: str = Field(description="Where deployments and artifacts come from.")
    triton_address: str = Field(description="This Triton's gRPC, as others reach it.")
    model_repository: Path = Field(description="The folder from which this Triton loads models.")
    backend_id: str = Field(default="triton-0", description="This Triton, unique in its pool.")
    pool: str = Field(default="default", description="The pool that this Triton belongs to.")
    artifact_limit_bytes: int = Field(
        default=64 * 1024**3, description="Larger artifacts are not fetched."
    )
