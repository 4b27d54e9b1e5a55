"""Which proxy a URL is reached through: the rules of HTTPS_PROXY, HTTP_PROXY and NO_PROXY."""

from __future__ import annotations

import base64
import ipaddress
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import unquote, urlsplit

_PORTS = {"http": 80, "https": 443}
_DEFAULT_PORT = 80


@dataclass(frozen=True)
class Proxy:
    """One proxy.

    Attributes:
        host: its name or address.
        port: its port.
        authorization: the value of the header `Proxy-Authorization`, or empty.
    """

    host: str
    port: int
    authorization: str = field(default="", repr=False)

    @classmethod
    def parse(cls, url: str) -> Self:
        """Reads `http://[USER:PASSWORD@]HOST[:PORT]`; without a scheme, `http` is meant.

        Raises:
            ValueError: the URL has another form; the message does not repeat its password.
        """
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/"):
            raise ValueError("a proxy must be http://[USER:PASSWORD@]HOST[:PORT]")
        authorization = ""
        if parts.username is not None:
            credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            authorization = f"Basic {base64.b64encode(credentials.encode()).decode()}"
        return cls(parts.hostname, parts.port or _DEFAULT_PORT, authorization)


@dataclass(frozen=True)
class Proxies:
    """The proxies of a process.

    Attributes:
        https: the URL of the proxy for `https` URLs; empty: none.
        http: that for `http` URLs.
        no_proxy: hosts that are reached directly, separated by commas: a name means its subdomains,
            too; addresses may be networks (`10.0.0.0/8`); each may have a port; `*` means all.
    """

    https: str = field(default="", repr=False)  # they may contain passwords
    http: str = field(default="", repr=False)
    no_proxy: str = ""

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: a proxy's URL has another form.
        """
        for url in filter(None, (self.https, self.http)):
            Proxy.parse(url)

    def proxy_of(self, url: str) -> Proxy | None:
        """Returns the proxy for a URL; None where it is reached directly, as this machine is."""
        parts = urlsplit(url)
        proxy = self.https if parts.scheme == "https" else self.http
        host = (parts.hostname or "").rstrip(".")
        if not proxy or _is_loopback(host):
            return None
        port = parts.port or _PORTS.get(parts.scheme, 0)
        entries = (entry.strip().lower() for entry in self.no_proxy.split(","))
        if any(_matches(entry, host, port) for entry in entries if entry):
            return None
        return Proxy.parse(proxy)


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def _matches(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    address = _address(host)
    network = _network(entry)
    if network is not None:
        return address is not None and address in network
    name, colon, wanted_port = entry.rpartition(":")
    if colon and wanted_port.isdigit():
        if int(wanted_port) != port:
            return False
        entry = name.strip("[]")
    if address is not None:
        return _address(entry) == address
    domain = entry.removeprefix("*").removeprefix(".")
    return host == domain or host.endswith(f".{domain}")


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None
