"""The settings of the registry."""

from __future__ import annotations

from pydantic import Field

from libs.config import ProviderSettings, default_database_url
from services.registry.upload import UploadLimits

_UPLOADS = UploadLimits()


class Settings(ProviderSettings):
    """Environment variables with the prefix `HEADRACE_`."""

    database_url: str = Field(
        default_factory=lambda values: default_database_url(values["home"], "registry"),
        description="The URL of the database.",
    )
    artifact_url: str = Field(
        default_factory=lambda values: (values["home"].absolute() / "artifacts").as_uri(),
        description="The URL of the artifact folder: file:///FOLDER.",
    )
    artifact_limit_bytes: int = Field(
        default=_UPLOADS.size_bytes, description="The maximum size of an artifact."
    )
    upload_limit: int = Field(
        default=_UPLOADS.concurrent, description="The maximum number of concurrent uploads."
    )
    upload_idle_seconds: float = Field(
        default=_UPLOADS.idle_seconds, description="The longest pause in an upload."
    )
    upload_bytes_per_second: int = Field(
        default=_UPLOADS.bytes_per_second,
        gt=0,
        description="The minimum average rate of an upload, apart from one longest pause.",
    )
