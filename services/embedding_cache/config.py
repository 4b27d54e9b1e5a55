"""Settings of the embedding cache."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from libs.config import ServiceSettings
from libs.http1 import ArrivalLimits

_ARRIVAL = ArrivalLimits()


class Settings(ServiceSettings):
    """Read from the environment, prefix `HEADRACE_`."""

    http_listen_address: str = Field(
        description="Where the HTTP server listens: unix:/path or host:port."
    )
    longest_http_call_seconds: float = Field(
        default=600.0,
        gt=0,
        description="Longest deadline of HTTP calls, also when the caller sets none. The edge ends "
        "calls after 600 s.",
    )
    http_idle_seconds: float = Field(
        default=_ARRIVAL.idle_seconds,
        gt=0,
        description="The longest pause in an HTTP request that arrives, and the time after which "
        "the rate matters.",
    )
    http_min_bytes_per_second: float = Field(
        default=_ARRIVAL.min_bytes_per_second,
        gt=0,
        description="The lowest rate at which an HTTP request may arrive.",
    )
    nats_url: str = Field(description="NATS server that stores usage events.")
    nats_credentials_file: Path | None = Field(
        default=None, description="USER:PASSWORD for the bus. Not set: it needs none."
    )
    router_address: str = Field(description="Router, which pushes the routes.")
    cost_address: str = Field(description="Cost service, which pushes the prices.")
    inference_address: str = Field(
        description="Inference service, which computes vectors that are not in the cache."
    )
    embedding_cache_limit_bytes: int = Field(
        default=128 * 1024 * 1024,
        gt=0,
        description="Most memory for cached vectors. The tenant that uses most of it loses vectors "
        "first.",
    )
    embedding_shared_models: str = Field(
        default="",
        description="Public names of models, separated by spaces, whose vectors all tenants share: "
        "each tenant then learns which texts others have embedded.",
    )
    embedding_in_flight_limit_texts: int = Field(
        default=16_384,
        gt=0,
        description="Most texts that are computed at the same time. A tenant alone gets two thirds "
        "of them, n busy tenants get 2/(1 + 2n) each.",
    )
    embedding_request_memory_limit_bytes: int = Field(
        default=128 * 1024 * 1024,
        gt=0,
        description="Most memory for requests in progress. A tenant alone gets half of it; the "
        "largest request needs 16 MiB.",
    )
    embedding_timeout_seconds: float = Field(
        default=120.0, gt=0, description="Deadline of one call to `inference`."
    )
