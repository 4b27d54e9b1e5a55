"""Settings of services that have an HTTP/1.1 server."""

from __future__ import annotations

from pydantic import Field

from libs.config import ServiceSettings
from libs.http1.arrival import ArrivalLimits

_ARRIVAL = ArrivalLimits()


class HttpSettings(ServiceSettings):
    """Read from the environment, prefix `HEADRACE_`."""

    http_listen_address: str = Field(
        description="Where the HTTP server listens: unix:/path or host:port."
    )
    longest_http_call_seconds: float = Field(
        default=600.0,
        gt=0,
        description="Deadline of HTTP calls whose caller sets none, or a later one. The edge ends "
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

    @property
    def arrival_limits(self) -> ArrivalLimits:
        """How long the server waits for the rest of a request."""
        return ArrivalLimits(self.http_idle_seconds, self.http_min_bytes_per_second)
