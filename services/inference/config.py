"""Settings of the inference service."""

from __future__ import annotations

from pydantic import Field

from libs.config import ServiceSettings


class Settings(ServiceSettings):
    """Read from the environment, prefix `HEADRACE_`."""

    router_address: str = Field(description="Where routes come from.")
    cost_address: str = Field(description="Where prices come from.")
    nats_url: str = Field(description="Where usage events go.")
