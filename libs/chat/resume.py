"""Resume tokens: where a broken answer continues.

A token is `{base64url of format, fingerprint and version}.{position}`. All but the position
is the same for every delta of an answer, so that a token costs one string. It is not signed: it is
only a position in the caller's own answer.
"""

from __future__ import annotations

import base64
import re
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

_FORMAT = 1
_HEAD = struct.Struct(">BI")  # format, fingerprint; the version follows
_TOKEN = re.compile(r"([A-Za-z0-9_-]{8,120})\.([0-9]{1,9})", re.ASCII)


@dataclass(frozen=True)
class ResumePoint:
    """A position in an answer.

    Attributes:
        fingerprint: of the request, see `fingerprint`.
        version: the semantic version of the model that started the answer.
        token_count: how many tokens the client has.
    """

    fingerprint: int
    version: str
    token_count: int


def fingerprint(fields: Iterable[object]) -> int:
    """Returns 32 bits that differ, in all probability, if any of the fields does."""
    return zlib.crc32("\0".join(map(str, fields)).encode())


def token_prefix(request_fingerprint: int, version: str) -> str:
    """Returns what all tokens of an answer start with; the position follows, in decimal."""
    head = _HEAD.pack(_FORMAT, request_fingerprint) + version.encode()
    return base64.urlsafe_b64encode(head).rstrip(b"=").decode() + "."


def parse_token(token: str) -> ResumePoint:
    """Reads a token.

    Raises:
        ValueError: it is not a token, or one of another format.
    """
    match = _TOKEN.fullmatch(token)
    if match is None:
        raise ValueError("malformed resume token")
    text, position = match.groups()
    head = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    token_format, request_fingerprint = _HEAD.unpack_from(head)
    if token_format != _FORMAT:
        raise ValueError(f"unknown format {token_format} of a resume token")
    version = head[_HEAD.size :].decode("ascii")
    return ResumePoint(request_fingerprint, version, int(position))
