"""Settings of the cost service."""

from __future__ import annotations

from pydantic import Field

from libs.config import BusSettings


class Settings(BusSettings):
    """Read from the environment, prefix `HEADRACE_`."""

    database_url: str | None = Field(
        default=None, description="Prices and ledger. Not set: SQLite in the home."
    )
    booking_concurrency: int = Field(
        default=256,
        ge=1,
        le=1024,
        description="Usage messages booked at the same time.",
    )
    price_poll_seconds: float = Field(
        default=2.0, gt=0, description="The interval at which prices of other replicas are read."
    )
