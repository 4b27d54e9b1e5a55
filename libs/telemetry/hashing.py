"""Hashes of inputs for logs: they show only whether inputs are equal."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Self

MIN_KEY_BYTES = 16
_HEX_DIGITS = 32


class InputHasher:
    """HMAC-SHA256 with a key of this installation, so that guessed inputs cannot be confirmed."""

    def __init__(self, key: bytes) -> None:
        if len(key) < MIN_KEY_BYTES:
            raise ValueError(f"the key has {len(key)} bytes, fewer than {MIN_KEY_BYTES}")
        self._key = key
        self._keyed = hmac.new(key, digestmod=hashlib.sha256)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Reads the key: all bytes of the file.

        Raises:
            OSError: the file cannot be read.
            ValueError: the key is too short.
        """
        return cls(path.read_bytes())

    def derived(self, label: str) -> Self:
        """Returns a hasher for another use, whose hashes tell nothing of this one's.

        Its key is a hash of all 32 bytes, of which `hash` returns the first half only: no input of
        this hasher shows it.

        Args:
            label: the use.
        """
        return type(self)(
            hmac.digest(self._key, f"headrace derived key: {label}".encode(), "sha256")
        )

    def hash(self, *parts: str | bytes) -> str:
        """Returns 32 hexadecimal digits; ("ab", "c") and ("a", "bc") have different hashes."""
        mac = self._keyed.copy()
        for part in parts:
            data = part.encode() if isinstance(part, str) else part
            mac.update(len(data).to_bytes(8, "big"))
            mac.update(data)
        return mac.hexdigest()[:_HEX_DIGITS]
