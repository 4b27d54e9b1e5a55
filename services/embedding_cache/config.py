"""Settings of the embedding cache."""

from __future__ import annotations

from pydantic import Field

from libs.config import BusSettings
from libs.http1.settings import HttpSettings


class Settings(HttpSettings, BusSettings):
    """Read from the environment, prefix `HEADRACE_`."""

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
