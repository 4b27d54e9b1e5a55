"""Settings that every process has. Each service derives its own in its `config.py`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class ServiceSettings(BaseSettings):
    """Read from the environment, prefix `HEADRACE_`."""

    model_config = SettingsConfigDict(env_prefix="HEADRACE_", extra="ignore", frozen=True)

    home: Path = Field(description="The folder that holds all state.")
    listen_address: str = Field(description="Where this process's gRPC server listens.")
    metrics_address: str = Field(description="Where Prometheus finds its metrics.")
    input_hash_key_file: Path = Field(description="The key of the hashes that stand for inputs.")
    log_level: str = Field(default="info", description="debug, info, warning or error.")
    drain_seconds: float = Field(default=5.0, description="Time for running calls after SIGTERM.")
    trace_sample_percent: float = Field(
        default=100.0, description="Share of the traces that begin here that are exported."
    )
    otlp_endpoint: str | None = Field(
        default=None,
        validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT",
        description="Where traces go, over gRPC. Unset: nowhere.",
    )


def default_database_url(home: Path, service: str) -> str:
    """Returns the URL of the SQLite file that a service has where no other database is set."""
    return f"sqlite+aiosqlite:///{home.absolute()}/data/{service}.db"
