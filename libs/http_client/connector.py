"""Making connections: name lookup, happy eyeballs, a proxy's tunnel, and TLS."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeVar

import aiohappyeyeballs
from aiohappyeyeballs import AddrInfoType

from libs.http_client.addresses import AddressPolicy, AddressRefusedError
from libs.http_client.proxies import Proxies, Proxy
from libs.http_client.response import HttpError

# Another of a host's addresses is tried in parallel to the first after so long (RFC 8305).
NEXT_ADDRESS_SECONDS = 0.25
# Connections that are opened at the same time look their host up once.
ADDRESSES_SECONDS = 10.0
MAX_PROXY_HEAD_BYTES = 16 * 1024

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] (\d{3})(?: ([^\r\n]*))?\r\n")

P = TypeVar("P", bound=asyncio.Protocol)


@dataclass(frozen=True, kw_only=True)
class Network:
    """How servers are reached.

    Attributes:
        ca_file: a file of PEM certificates whose authorities are trusted besides those of this
            machine (or of `SSL_CERT_FILE`).
        proxies: the proxies in between.
        policy: which addresses may be connected to; None: all.
    """

    ca_file: Path | None = None
    proxies: Proxies = field(default_factory=Proxies)
    policy: AddressPolicy | None = None


class Connector:
    """Opens connections to one host, through a proxy where one is given.

    Through a proxy, TLS passes in a tunnel (`CONNECT`); requests without TLS are sent to the proxy
    itself, with the full URL in their first line.

    A policy is applied to the addresses that a name was resolved to, and the connection goes to one
    of these: another answer of the name server changes nothing. A proxy resolves names itself, so
    there the policy holds for what this machine resolves them to, where it can; the proxy's own
    address is a setting and always allowed.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        secure: bool,
        timeout_seconds: float,
        proxy: Proxy | None,
        ca_file: Path | None,
        policy: AddressPolicy | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._secure = secure
        self._timeout_seconds = timeout_seconds
        self._proxy = proxy
        self._ca_file = ca_file
        self._policy = policy
        self._peer = (proxy.host, proxy.port) if proxy else (host, port)
        self._lookup_lock = asyncio.Lock()
        self._addresses: Sequence[AddrInfoType] = ()
        self._addresses_until_seconds = 0.0

    async def connect(self, protocol: Callable[[], P]) -> P:
        """Returns the protocol of a new connection, after TLS's handshake.

        Raises:
            OSError: the server cannot be reached, `TimeoutError` included.
            HttpError: the proxy refused.
            AddressRefusedError: the policy allows none of the host's addresses.
        """
        failure = f"no connection to {self._host}:{self._port}"
        if self._proxy:
            failure += f" through the proxy {self._proxy.host}:{self._proxy.port}"
        tls = tls_context(self._ca_file) if self._secure else None
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await self._connect(protocol, tls)
        except TimeoutError as error:
            raise TimeoutError(f"{failure} in {self._timeout_seconds:g} s") from error
        except AddressRefusedError:
            raise
        except HttpError as error:
            raise HttpError(f"{failure}: {error}") from error
        except (socket.gaierror, UnicodeError, RuntimeError) as error:  # the last is uvloop's
            raise ConnectionError(f"{failure}: {error}") from error

    async def _connect(self, protocol: Callable[[], P], tls: ssl.SSLContext | None) -> P:
        sock = await aiohappyeyeballs.start_connection(
            await self._lookup(), happy_eyeballs_delay=NEXT_ADDRESS_SECONDS
        )
        if self._proxy and tls:
            try:
                await self._open_tunnel(sock, self._proxy)
            except BaseException:
                sock.close()
                raise
        _, connection = await asyncio.get_running_loop().create_connection(
            protocol,
            sock=sock,
            ssl=tls,
            server_hostname=self._host.rstrip(".") if tls else None,
        )
        return connection

    async def _open_tunnel(self, sock: socket.socket, proxy: Proxy) -> None:
        loop = asyncio.get_running_loop()
        host = f"[{self._host}]" if ":" in self._host else self._host
        target = f"{host}:{self._port}"
        request = f"CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n"
        if proxy.authorization:
            request += f"proxy-authorization: {proxy.authorization}\r\n"
        await loop.sock_sendall(sock, f"{request}\r\n".encode("latin-1"))
        head = b""
        while b"\r\n\r\n" not in head:
            data = await loop.sock_recv(sock, 4096)
            if not data:
                raise HttpError("the proxy closed the connection")
            head += data
            if len(head) > MAX_PROXY_HEAD_BYTES:
                raise HttpError("the head of the proxy's response is too large")
        status = _STATUS_LINE.match(head)
        if status is None:
            raise HttpError("the proxy does not speak HTTP")
        if not status[1].startswith(b"2"):
            reason = b" ".join(filter(None, status.groups())).decode("latin-1")
            raise HttpError(f"the proxy answered {reason}")
        if not head.endswith(b"\r\n\r\n") or b"\r\n\r\n" in head[:-4]:
            raise HttpError("the proxy sent data before the server did")

    async def _lookup(self) -> Sequence[AddrInfoType]:
        loop = asyncio.get_running_loop()
        async with self._lookup_lock:
            if loop.time() >= self._addresses_until_seconds:
                host, port = self._peer
                found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                if self._proxy is None:
                    self._addresses = self._allowed(found)
                else:
                    self._allowed(await self._resolved_here())
                    self._addresses = found
                self._addresses_until_seconds = loop.time() + ADDRESSES_SECONDS
        return self._addresses

    async def _resolved_here(self) -> Sequence[AddrInfoType]:
        """Returns the addresses of the host behind a proxy; none where this machine knows none."""
        if self._policy is None:
            return ()
        try:
            return await asyncio.get_running_loop().getaddrinfo(
                self._host, self._port, type=socket.SOCK_STREAM
            )
        except (socket.gaierror, UnicodeError, RuntimeError):
            return ()

    def _allowed(self, found: Sequence[AddrInfoType]) -> Sequence[AddrInfoType]:
        if self._policy is None:
            return found
        allowed = [each for each in found if self._policy.allows(str(each[4][0]))]
        if found and not allowed:
            raise AddressRefusedError(f"{self._host} has no address that may be connected to")
        return allowed


@cache
def tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """Returns the settings of TLS, read once.

    Raises:
        OSError: the file cannot be read, or has no certificates.
    """
    context = ssl.create_default_context()
    if ca_file is not None:
        context.load_verify_locations(ca_file)
    context.set_alpn_protocols(["http/1.1"])
    return context
