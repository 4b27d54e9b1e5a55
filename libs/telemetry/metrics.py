"""The process's metrics, for Prometheus."""

from __future__ import annotations

from threading import Thread
from wsgiref.simple_server import WSGIServer

import prometheus_client


class MetricsEndpoint:
    """An HTTP server, in a thread of its own, that answers `/metrics`.

    Attributes:
        address: `host:port` where it listens.
    """

    def __init__(self, server: WSGIServer, thread: Thread, *, host: str) -> None:
        self.address = f"{host}:{server.server_port}"
        self._server = server
        self._thread = thread

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(address: str) -> MetricsEndpoint:
    """Serves the metrics at `host:port`; with port 0, at a free one.

    Raises:
        OSError: the address is taken.
    """
    # Else each has a second series, of when it was made, that nobody reads.
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # ships no type
    host, _, port = address.rpartition(":")
    server, thread = prometheus_client.start_http_server(int(port), addr=host)
    return MetricsEndpoint(server, thread, host=host)
