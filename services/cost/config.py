"""Settings of the cost service."""

from __future__ import annotations

from pydantic import Field

from libs.config import ServiceSettings


class Settings(ServiceSettings):
    """Read from the environment, prefix `HEADRACE_`."""

    nats_url: str = Field(description="Where usage events come from.")
    database_url: str | None = Field(
        default=None, description="The price book and the ledger. Unset: SQLite in the home."
    )
    booking_concurrency: int = Field(
        default=256, ge=1, le=1024, description="Usage events in hand at a time."
    )
    price_poll_seconds: float = Field(
        default=2.0, gt=0, description="How often to look for prices that another replica made."
    )
