"""Serves the metrics of the process to Prometheus."""

from __future__ import annotations

from threading import Thread
from wsgiref.simple_server import WSGIServer

import prometheus_client


class MetricsEndpoint:
    """An HTTP server for `/metrics` in its own thread.

    Attributes:
        address: its `host:port`.
    """

    def __init__(self, server: WSGIServer, thread: Thread, *, host: str) -> None:
        self.address = f"{host}:{server.server_port}"
        self._server = server
        self._thread = thread

    def close(self) -> None:
        """Stops the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(address: str) -> MetricsEndpoint:
    """Serves the metrics at `host:port`; port 0 chooses a free one.

    Raises:
        OSError: the address is in use.
    """
    # Otherwise each metric has a second series with its creation time.
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # ships no type
    host, _, port = address.rpartition(":")
    server, thread = prometheus_client.start_http_server(int(port), addr=host)
    return MetricsEndpoint(server, thread, host=host)
