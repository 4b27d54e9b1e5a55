"""Settings that every process has. Each service derives its own in its `config.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from libs.addresses import unix_path
from libs.tls import TlsFiles


class ServiceSettings(BaseSettings):
    """Read from the environment, prefix `HEADRACE_`."""

    model_config = SettingsConfigDict(
        env_prefix="HEADRACE_",
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,  # a value may be a secret
    )

    home: Path = Field(description="Folder of all state.")
    listen_address: str = Field(
        description="Where the gRPC server listens: unix:/path or host:port."
    )
    metrics_address: str = Field(description="Address of the metrics for Prometheus.")
    input_hash_key_file: Path = Field(description="Key for hashes of inputs in logs.")
    tls_ca_file: Path | None = Field(
        default=None,
        description="PEM certificates of the mesh's authorities. With the next two, TLS with "
        "certificates of both sides is used on TCP inside the mesh.",
    )
    tls_certificate_file: Path | None = Field(
        default=None, description="PEM certificate of this process."
    )
    tls_key_file: Path | None = Field(
        default=None, description="PEM private key of the certificate."
    )
    plaintext: bool = Field(
        default=False,
        description="Allows TCP without TLS inside the mesh. Any program that reaches the ports "
        "is trusted with any identity.",
    )
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

    @property
    def tls(self) -> TlsFiles | None:
        """The certificates for TCP connections inside the mesh; None: there are none."""
        if self.tls_ca_file and self.tls_certificate_file and self.tls_key_file:
            return TlsFiles(
                ca=self.tls_ca_file, certificate=self.tls_certificate_file, key=self.tls_key_file
            )
        return None

    @model_validator(mode="after")
    def _callers_are_known(self) -> Self:
        """Refuses addresses at which any program could call, or be called in the mesh's place."""
        if self.tls is not None or self.plaintext:
            return self
        given = (self.tls_ca_file, self.tls_certificate_file, self.tls_key_file)
        if any(given):
            raise ValueError(
                "HEADRACE_TLS_CA_FILE, HEADRACE_TLS_CERTIFICATE_FILE and HEADRACE_TLS_KEY_FILE "
                "must be set together"
            )
        exposed = [
            f"HEADRACE_{name.upper()}"
            for name in type(self).model_fields
            if (name.endswith("_address") or name == "nats_url")
            and name != "metrics_address"  # read only, and it has no secrets
            and (address := getattr(self, name)) is not None  # a server that is optional
            and unix_path(address) is None
        ]
        if exposed:
            raise ValueError(
                f"{', '.join(exposed)}: without TLS, any program that reaches a TCP port could act "
                "as any caller. Use unix:/path; or set HEADRACE_TLS_CA_FILE, "
                "HEADRACE_TLS_CERTIFICATE_FILE and HEADRACE_TLS_KEY_FILE; or, where no one else "
                "can reach the ports, HEADRACE_PLAINTEXT=true"
            )
        return self


class ProviderSettings(ServiceSettings):
    """The settings of services that check where external providers are."""

    provider_allowed_networks: str = Field(
        default="",
        description="Networks that providers may be in besides the public internet, such as "
        "127.0.0.0/8, separated by commas.",
    )
    provider_private_networks: bool = Field(
        default=False,
        description="Whether providers may be in the networks for private use: 10.0.0.0/8, "
        "172.16.0.0/12, 192.168.0.0/16, fc00::/7.",
    )


class BusSettings(ServiceSettings):
    """The settings of services that use the bus."""

    nats_url: str = Field(description="The NATS server, or several, separated by commas.")
    nats_credentials_file: Path | None = Field(
        default=None, description="USER:PASSWORD for the bus. Not set: it needs none."
    )


class DurableBusSettings(BusSettings):
    """The settings of services that check that the bus does not lose what it acknowledges."""

    nats_system_credentials_file: Path | None = Field(
        default=None,
        description="USER:PASSWORD of the bus's system account. If set, the service refuses to "
        "start with a NATS that acknowledges before it has synced to disk.",
    )


def default_database_url(home: Path, service: str) -> str:
    """Returns the URL of the default SQLite file of a service."""
    return f"sqlite+aiosqlite:///{home.absolute()}/data/{service}.db"
