"""The settings of the edge in the environment: address, TLS, web pages, limits."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from deploy.envoy.cors import LOCAL_ORIGINS, Cors
from deploy.envoy.limits import Limits
from deploy.errors import CliError
from deploy.host import LOOPBACK
from deploy.local import edge_certificate

PREFIX = "HEADRACE_EDGE_"
ADDRESS = f"{PREFIX}ADDRESS"
CERTIFICATE = f"{PREFIX}TLS_CERTIFICATE"
KEY = f"{PREFIX}TLS_KEY"
PLAINTEXT = f"{PREFIX}PLAINTEXT"
# What the operator must write to send tokens unencrypted over a network.
PLAINTEXT_ACCEPTED = "tokens-are-readable"


@dataclass(frozen=True, kw_only=True)
class EdgeSettings:
    """Where the edge listens, and for whom.

    Attributes:
        address: the IP address that it listens on.
        certificate_file: the chain of its certificate, PEM; None: callers connect without TLS.
        key_file: the private key, PEM; None without a certificate.
        plaintext_accepted: whether callers on a network may connect without TLS.
        hsts_seconds: for how long browsers must refuse to call without TLS.
        trusted_proxies: how many proxies before the edge name the caller's address.
        cors: the web pages that may call.
        limits: what callers may use.
    """

    address: str = LOOPBACK
    certificate_file: Path | None = None
    key_file: Path | None = None
    plaintext_accepted: bool = False
    hsts_seconds: int = 31_536_000
    trusted_proxies: int = 0
    cors: Cors = field(default_factory=Cors)
    limits: Limits = field(default_factory=Limits)

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> EdgeSettings:
        """Reads the variables that begin with `HEADRACE_EDGE_`, except the port.

        Raises:
            CliError: one is invalid.
        """
        certificate, key = (environment.get(name) for name in (CERTIFICATE, KEY))
        if bool(certificate) != bool(key):
            raise CliError(f"set both {CERTIFICATE} and {KEY}, or neither")
        accepted = environment.get(PLAINTEXT) or ""
        if accepted not in ("", PLAINTEXT_ACCEPTED):
            raise CliError(f"{PLAINTEXT} must be {PLAINTEXT_ACCEPTED!r} or unset")
        return cls(
            address=_ip_address(environment.get(ADDRESS) or LOOPBACK),
            certificate_file=Path(certificate).absolute() if certificate else None,
            key_file=Path(key).absolute() if key else None,
            plaintext_accepted=bool(accepted),
            hsts_seconds=_number(environment, "HSTS_SECONDS", cls.hsts_seconds),
            trusted_proxies=_number(environment, "TRUSTED_PROXIES", cls.trusted_proxies),
            cors=_cors(environment),
            limits=_limits(environment),
        )

    def check(self) -> None:
        """Checks that an edge may start with these settings.

        Raises:
            CliError: tokens would cross a network unencrypted and the operator has not accepted
                that, or the certificate cannot be used.
        """
        if self.certificate_file and self.key_file:
            try:
                edge_certificate.check(self.certificate_file, self.key_file)
            except ValueError as error:
                raise CliError(f"{CERTIFICATE}, {KEY}: {error}") from error
        elif not self.is_loopback and not self.plaintext_accepted:
            raise CliError(
                f"{ADDRESS} is {self.address}, so that callers' tokens would cross the network "
                f"unencrypted. Set {CERTIFICATE} and {KEY} to the files of a certificate, or, "
                f"where another program terminates TLS in front of the edge, "
                f"{PLAINTEXT}={PLAINTEXT_ACCEPTED}"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can call."""
        return ipaddress.ip_address(self.address).is_loopback

    def listen_address(self, port: int) -> str:
        """Returns the `host:port` that the edge listens on."""
        return host_port(self.address, port)

    def call_address(self, port: int) -> str:
        """Returns the `host:port` that a program on this machine calls."""
        found = ipaddress.ip_address(self.address)
        if not found.is_unspecified:
            return host_port(self.address, port)
        return host_port(LOOPBACK if found.version == 4 else "::1", port)  # noqa: PLR2004 - IPv4


def host_port(host: str, port: int) -> str:
    """Returns `host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _ip_address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text.strip("[]")))
    except ValueError as error:
        raise CliError(
            f"{ADDRESS} must be an IP address of this machine, such as 127.0.0.1, 0.0.0.0 or ::, "
            f"but it is {text!r}"
        ) from error


def _cors(environment: Mapping[str, str]) -> Cors:
    try:
        return Cors(
            origins=_words(environment, "CORS_ORIGINS") or LOCAL_ORIGINS,
            headers=tuple(name.lower() for name in _words(environment, "CORS_HEADERS")),
            max_age_seconds=_number(environment, "CORS_MAX_AGE_SECONDS", Cors.max_age_seconds),
        )
    except ValueError as error:
        raise CliError(f"{PREFIX}CORS_…: {error}") from error


def _limits(environment: Mapping[str, str]) -> Limits:
    """Reads one variable for each limit, such as `HEADRACE_EDGE_MAX_CONNECTIONS`."""
    values = {
        limit.name: _number(environment, limit.name.upper(), int(str(limit.default)))
        for limit in fields(Limits)
    }
    try:
        return Limits(**values)
    except ValueError as error:
        raise CliError(f"{PREFIX}…: {error}") from error


def _words(environment: Mapping[str, str], name: str) -> tuple[str, ...]:
    words = (environment.get(PREFIX + name) or "").split(",")
    return tuple(word.strip() for word in words if word.strip())


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(PREFIX + name) or str(default)
    if not text.isdecimal():
        raise CliError(f"{PREFIX}{name} must be a whole number, but it is {text!r}")
    return int(text)
