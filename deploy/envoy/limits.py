"""The limits of the edge: how long bodies may take, and how much one caller or all may use."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024
# All that a call of an open method, which needs no token, may send. A health check sends at most
# the name of a service; a client of reflection asks for some hundred names in one call.
MAX_OPEN_BODY_BYTES = 16 * 1024
# How long calls of open methods may run: a check, and what stays open.
MAX_CHECK_SECONDS = 5
MAX_OPEN_STREAM_SECONDS = 60
# Connections with HTTP/1.1 to a service beyond its requests, for those that it refuses.
SPARE_CONNECTIONS = 128
# Envoy itself, with its configuration, uses a third of this.
MIN_HEAP_MIB = 128


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an operator may change.

    Attributes:
        body_seconds: how long the body of a request may take until all of it has arrived. Uploads
            and streams of requests are excepted.
        body_idle_seconds: how long nothing of a body may arrive.
        stream_idle_seconds: how long nothing may pass in either direction of a call that streams
            its requests: an upload, or a stream of tensors.
        tenant_requests_per_second: the requests of one tenant, on average; a burst may have twice
            as many.
        open_requests_per_second: the calls without a token from one address, likewise.
        max_requests: the requests that run in all replicas of a service, of all callers.
        max_connections: the connections of all callers.
        max_heap_mib: the memory of Envoy. From 60 % on, it ends the streams that hold the most; at
            95 % it refuses requests, and at 98 % connections.
    """

    body_seconds: int = 60
    body_idle_seconds: int = 10
    stream_idle_seconds: int = 120
    tenant_requests_per_second: int = 5000
    open_requests_per_second: int = 50
    max_requests: int = 4096
    max_connections: int = 10_000
    max_heap_mib: int = 1024

    def __post_init__(self) -> None:
        """Checks the limits.

        Raises:
            ValueError: one is not positive, or the memory is less than Envoy itself needs.
        """
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, but it is {value}")
        if self.max_heap_mib < MIN_HEAP_MIB:
            raise ValueError(
                f"max_heap_mib must be at least {MIN_HEAP_MIB}, but it is {self.max_heap_mib}"
            )
