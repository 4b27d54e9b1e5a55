"""A client of one URL that keeps its connections, and reads responses as they come.

`httptools` parses HTTP, as in the server. Each request has its own connection, so that cancelling
it stops the server, too.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from urllib.parse import urlsplit

from libs.http_client.connection import ClientConnection
from libs.http_client.connector import Connector, Network
from libs.http_client.response import Response
from libs.http_client.urls import PORTS
from libs.http_headers import header_lines


class HttpClient:
    """Sends POST requests to one URL."""

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str],
        connect_seconds: float,
        keep_alive_seconds: float,
        network: Network | None = None,
    ) -> None:
        """Makes a client; it connects with its first request.

        Args:
            url: `http(s)://HOST[:PORT]/PATH`.
            headers: of all requests.
            connect_seconds: the time limit of a connection, with lookup, proxy and TLS.
            keep_alive_seconds: how long an idle connection is kept. Shorter than servers do: one
                must not be closed while a request is on its way.
            network: private authorities and proxies; None: neither.
        """
        network = network or Network()
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        host = parts.hostname or ""
        host = host if host.isascii() else host.encode("idna").decode()
        port = parts.port or PORTS[parts.scheme]
        named = f"[{host}]" if ":" in host else host
        if port != PORTS[parts.scheme]:
            named += f":{port}"
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        proxy = network.proxies.proxy_of(f"{parts.scheme}://{named}")
        if proxy is not None and not secure:  # else the proxy sees encrypted bytes only
            target = f"http://{named}{target}"
            if proxy.authorization:
                headers = {**headers, "proxy-authorization": proxy.authorization}
        self._head = f"POST {target} HTTP/1.1\r\nhost: {named}\r\n{header_lines(headers)}"
        self._connector = Connector(
            host=host,
            port=port,
            secure=secure,
            timeout_seconds=connect_seconds,
            proxy=proxy,
            ca_file=network.ca_file,
            policy=network.policy,
        )
        self._keep_alive_seconds = keep_alive_seconds
        self._idle: deque[ClientConnection] = deque()
        self._sweep: asyncio.TimerHandle | None = None
        self._closed = False

    async def post(self, body: bytes, *, headers: Mapping[str, str]) -> Response:
        """Sends a request and returns its response as soon as the head has arrived.

        Raises:
            HttpError: invalid HTTP, a connection that was closed, a proxy that refused, or an
                address that is not allowed (`AddressRefusedError`).
            OSError: the server cannot be reached, `TimeoutError` included.
        """
        head = f"{self._head}{header_lines(headers)}content-length: {len(body)}\r\n\r\n"
        request = head.encode("latin-1") + body
        connection = self._kept() or await self._connector.connect(self._new_connection)
        return await connection.send(request)

    def close(self) -> None:
        """Closes the idle connections now, and the others when their responses end."""
        self._closed = True
        if self._sweep is not None:
            self._sweep.cancel()
        while self._idle:
            self._idle.pop().abort()

    def _new_connection(self) -> ClientConnection:
        return ClientConnection(on_free=self._keep)

    def _kept(self) -> ClientConnection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    def _keep(self, connection: ClientConnection) -> None:
        if self._closed:
            connection.abort()
            return
        self._idle.append(connection)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(
                self._keep_alive_seconds, self._close_unused
            )

    def _close_unused(self) -> None:
        """Closes connections that were idle for too long; the longest idle are first."""
        loop = asyncio.get_running_loop()
        self._sweep = None
        oldest = loop.time() - self._keep_alive_seconds
        while self._idle and self._idle[0].idle_since_seconds <= oldest:
            self._idle.popleft().abort()
        if self._idle:
            at = self._idle[0].idle_since_seconds + self._keep_alive_seconds
            self._sweep = loop.call_at(at, self._close_unused)
