"""Settings that every process has. Each service derives its own in its `config.py`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class ServiceSettings(BaseSettings):
    """Read from the environment, prefix `HEADRACE_`."""

    model_config = SettingsConfigDict(
        env_prefix="HEADRACE_",
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,  # a value may be a secret
    )

    home: Path = Field(description="Folder of all state.")
    listen_address: str = Field(description="Address of the gRPC server.")
    metrics_address: str = Field(description="Address of the metrics for Prometheus.")
    input_hash_key_file: Path = Field(description="Key for hashes of inputs in logs.")
    log_level: str = Field(default="info", description="debug, info, warning or error.")
    drain_seconds: float = Field(default=5.0, description="Time for running calls after SIGTERM.")
    trace_sample_percent: float = Field(
        default=100.0, description="Share of the traces started here that are exported."
    )
    otlp_endpoint: str | None = Field(
        default=None,
        validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT",
        description="OTLP collector for traces, over gRPC. Unset: no export.",
    )


class ProviderSettings(ServiceSettings):
    """The settings of services that check where external providers are."""

    provider_allowed_networks: str = Field(
        default="",
        description="Networks that providers may be in beside the public internet, such as "
        "127.0.0.0/8, separated by commas.",
    )
    provider_private_networks: bool = Field(
        default=False,
        description="Whether providers may be in the networks for private use: 10.0.0.0/8, "
        "172.16.0.0/12, 192.168.0.0/16, fc00::/7.",
    )


def default_database_url(home: Path, service: str) -> str:
    """Returns the URL of the default SQLite file of a service."""
    return f"sqlite+aiosqlite:///{home.absolute()}/data/{service}.db"
