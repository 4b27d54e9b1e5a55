"""Settings of the registry."""

from __future__ import annotations

from pydantic import Field

from libs.config import ServiceSettings, default_database_url
from services.registry.upload import UploadLimits

_UPLOADS = UploadLimits()


class Settings(ServiceSettings):
    """Read from the environment, prefix `HEADRACE_`."""

    database_url: str = Field(
        default_factory=lambda values: default_database_url(values["home"], "registry"),
        description="Where the records are.",
    )
    artifact_url: str = Field(
        default_factory=lambda values: (values["home"].absolute() / "artifacts").as_uri(),
        description="Where the artifacts are: file:///FOLDER.",
    )
    artifact_limit_bytes: int = Field(
        default=_UPLOADS.size_bytes, description="How large an artifact may be."
    )
    upload_limit: int = Field(
        default=_UPLOADS.concurrent, description="How many uploads may run at the same time."
    )
    upload_idle_seconds: float = Field(
        default=_UPLOADS.idle_seconds, description="How long an upload may send nothing."
    )
