"""Settings of the inference service."""

from __future__ import annotations

from pydantic import Field

from libs.config import ServiceSettings


class Settings(ServiceSettings):
    """Read from the environment, prefix `HEADRACE_`."""

    http_listen_address: str = Field(description="Where its HTTP server listens.")
    longest_http_call_seconds: float = Field(
        default=600.0,
        gt=0,
        description="Deadline of HTTP calls whose caller sets none, or a later one. The edge ends "
        "calls after 600 s.",
    )
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
    hedge_after_seconds: float = Field(
        default=0.0,
        description="A second backend is asked after so long without a token. 0: never.",
    )
    hedge_max_share: float = Field(
        default=0.05, description="At most this share of all requests is asked twice."
    )
