"""The settings of the pool agent."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from libs.config import ServiceSettings


class Settings(ServiceSettings):
    """Environment variables with the prefix `HEADRACE_`."""

    registry_address: str = Field(description="The address of the registry.")
    triton_address: str = Field(description="The gRPC address of Triton, as other services use it.")
    triton_control_key_file: Path | None = Field(
        default=None,
        description="The secret of calls that change what Triton serves. Not set: Triton needs "
        "none.",
    )
    model_repository: Path = Field(description="The folder from which Triton loads models.")
    backend_id: str = Field(default="triton-0", description="The id of Triton, unique in its pool.")
    pool: str = Field(default="default", description="The pool of Triton.")
    artifact_limit_bytes: int = Field(
        default=64 * 1024**3, description="The maximum size of an artifact; larger ones fail."
    )
