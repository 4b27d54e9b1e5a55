"""The settings of the router."""

from __future__ import annotations

from pydantic import Field

from libs.config import ServiceSettings


class Settings(ServiceSettings):
    """Environment variables with the prefix `HEADRACE_`."""

    registry_address: str = Field(description="The address of the registry.")
