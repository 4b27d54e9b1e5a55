"""Settings of the embedding cache."""

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
    nats_url: str = Field(description="Where usage events go.")
    router_address: str = Field(description="Who pushes the routes.")
    cost_address: str = Field(description="Who pushes the price book.")
    inference_address: str = Field(description="Who computes what is not in the cache.")
    embedding_cache_limit_bytes: int = Field(
        default=128 * 1024 * 1024, gt=0, description="Memory that vectors may have."
    )
    embedding_in_flight_limit_texts: int = Field(
        default=16_384, gt=0, description="Texts that may be computed at a time."
    )
    embedding_timeout_seconds: float = Field(
        default=120.0, gt=0, description="Time for one batch at `inference`."
    )
