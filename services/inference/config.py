"""Settings of the inference service."""

from __future__ import annotations

from pathlib import Path

from pydantic import AliasChoices, Field

from libs.config import ServiceSettings


class Settings(ServiceSettings):
    """Read from the environment, prefix `HEADRACE_`."""

    http_listen_address: str = Field(description="Where its HTTP server listens.")
    router_address: str = Field(description="Where routes come from.")
    cost_address: str = Field(description="Where prices come from.")
    nats_url: str = Field(description="Where usage events go.")
    nats_monitoring_url: str | None = Field(
        default=None, description="Where to see that the bus writes before it acknowledges."
    )
    stall_first_token_seconds: float = Field(
        default=60.0,
        description="A backend that is silent for longer at first has failed; asked for "
        "a whole answer it has 300 s at least.",
    )
    stall_between_tokens_seconds: float = Field(
        default=15.0, description="One that falls silent for longer later has failed."
    )
    coalesce_max_delay_seconds: float = Field(
        default=0.020,
        ge=0,
        description="Where a reader or this process lags, tokens are gathered for so long at most.",
    )
    slow_reader_seconds: float = Field(
        default=60.0,
        ge=0,
        description="A reader that takes nothing for so long ends its answer. 0: never.",
    )
    provider_ca_file: Path | None = Field(
        default=None,
        description="Certificates (PEM) of private authorities that providers' certificates may "
        "have, beside those of the machine.",
    )
    provider_https_proxy: str = Field(
        default="",
        repr=False,  # it may have a password
        validation_alias=AliasChoices("HEADRACE_PROVIDER_HTTPS_PROXY", "HTTPS_PROXY"),
        description="The proxy to providers with https URLs, http://[USER:PASSWORD@]HOST:PORT.",
    )
    provider_http_proxy: str = Field(
        default="",
        repr=False,
        validation_alias=AliasChoices("HEADRACE_PROVIDER_HTTP_PROXY", "HTTP_PROXY"),
        description="The proxy to providers with http URLs.",
    )
    provider_no_proxy: str = Field(
        default="",
        validation_alias=AliasChoices("HEADRACE_PROVIDER_NO_PROXY", "NO_PROXY"),
        description="Providers that are reached directly: names with their subdomains, addresses, "
        "networks, each with a port where it matters, separated by commas.",
    )
    hedge_after_seconds: float = Field(
        default=0.0,
        description="A second backend is asked after so long without a token. 0: never.",
    )
    hedge_max_share: float = Field(
        default=0.05, description="At most this share of all requests is asked twice."
    )
