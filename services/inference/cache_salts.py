"""Salts that keep the prefix caches of tenants apart in the engines.

An engine shares what it has read of a prompt only between requests with the same salt. Else the
time to the first token, and `cached_tokens`, would reveal to a tenant what others have asked.
"""

from __future__ import annotations

from functools import lru_cache

from libs.telemetry.hashing import InputHasher

MAX_KNOWN_TENANTS = 4096


class CacheSalts:
    """Salts of tenants: the same in every process with the same key, and not to be guessed."""

    def __init__(self, hasher: InputHasher) -> None:
        # The log has hashes with the same key, of two parts or pairs of parts: none has three.
        self._salt = lru_cache(MAX_KNOWN_TENANTS)(
            lambda tenant: hasher.hash("prefix cache", "tenant", tenant)
        )

    def of(self, tenant: str) -> str:
        """Returns the salt of a tenant, 32 hexadecimal digits."""
        return self._salt(tenant)
