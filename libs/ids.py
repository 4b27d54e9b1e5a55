"""UUIDs: version 7 for IDs made here, any version for IDs of clients."""

from __future__ import annotations

import os
import uuid

from libs.clock import Clock
from libs.errors import InvalidArgument


def uuid7(clock: Clock) -> str:
    """Makes a UUIDv7 (RFC 9562): 48 bits of Unix milliseconds, then random bits."""
    milliseconds = int(clock.now().timestamp() * 1000)
    value = (milliseconds << 80) | int.from_bytes(os.urandom(10), "big")
    value = (value & ~(0xF << 76)) | (0x7 << 76)
    value = (value & ~(0x3 << 62)) | (0x2 << 62)
    digits = f"{value:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def check_uuid(value: str, *, field: str) -> str:
    """Returns `value` if it is a UUID in its canonical form.

    Raises:
        InvalidArgument: the value is not a UUID in canonical form.
    """
    canonical: str | None
    try:
        canonical = str(uuid.UUID(value))
    except ValueError:
        canonical = None
    if canonical != value:
        raise InvalidArgument.of_field(field, "must be a UUID in its canonical form")
    return value
