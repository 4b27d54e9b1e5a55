"""URLs of servers outside the mesh, in the one spelling that can be compared.

Parsers differ about unusual URLs: what one of them reads as a path is a host to another. Such a URL
is refused, so that all who read it agree on where it leads.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import unquote, urlsplit

MAX_URL_LENGTH = 2048
PORTS = {"http": 80, "https": 443}

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
_MAX_HOST_LENGTH = 253


@dataclass(frozen=True)
class Url:
    """An `http` or `https` URL without user, query and fragment.

    Attributes:
        scheme: `http` or `https`.
        host: a name in lower case and in ASCII, without a dot at its end; or an address as
            `ipaddress` writes it.
        port: the port, also where it is the default.
        segments: the parts of the path, as they are written.
    """

    scheme: str
    host: str
    port: int
    segments: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads a URL.

        Raises:
            ValueError: it has another form, or parsers could disagree about it.
        """
        if len(text) > MAX_URL_LENGTH or not text.isprintable() or any(c in text for c in ' \\"'):
            raise ValueError("the URL has a space, a backslash, a quote, or too many characters")
        if any(character in text for character in "@?#"):
            raise ValueError("the URL has a user, a query or a fragment")
        parts = urlsplit(text)
        if parts.scheme not in PORTS or not text[len(parts.scheme) :].startswith("://"):
            raise ValueError("the URL must start with https:// or http://")
        netloc = parts.netloc
        if not parts.hostname or parts.port == 0 or netloc.endswith(":") or "%" in netloc:
            raise ValueError("the URL has no valid host and port")
        return cls(
            parts.scheme,
            _host(parts.hostname, bracketed=netloc.startswith("[")),
            parts.port or PORTS[parts.scheme],
            _segments(parts.path),
        )

    def is_within(self, prefix: Url) -> bool:
        """Returns whether another URL is a prefix of this one, by whole parts of the path."""
        origin = (self.scheme, self.host, self.port)
        return (
            origin == (prefix.scheme, prefix.host, prefix.port)
            and self.segments[: len(prefix.segments)] == prefix.segments
        )

    def __str__(self) -> str:
        """Returns the URL without a slash at its end."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == PORTS[self.scheme] else f":{self.port}"
        return "/".join([f"{self.scheme}://{host}{port}", *self.segments])


def _host(text: str, *, bracketed: bool) -> str:
    if bracketed:
        return str(ipaddress.IPv6Address(text))  # a ValueError, too
    # The dot at the end of a name ends the search for suffixes; the host is the same.
    name = text.removesuffix(".").encode("idna").decode().lower()
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        # C libraries read `127.1`, `0x7f000001` and `2130706433` as addresses.
        if text != name:
            raise ValueError("the URL's host is an address with a dot at its end")
        return str(ipaddress.IPv4Address(name))
    if len(name) > _MAX_HOST_LENGTH or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("the URL's host is not a valid name")
    return name


def _segments(path: str) -> tuple[str, ...]:
    segments = tuple(path.removeprefix("/").removesuffix("/").split("/")) if path else ()
    for segment in segments if segments != ("",) else ():
        decoded = unquote(segment)
        if decoded in ("", ".", "..") or any(c in decoded for c in "/\\%") or not segment.isascii():
            raise ValueError("the URL's path has an empty part, a dot part, or a coded slash")
    return segments if segments != ("",) else ()
