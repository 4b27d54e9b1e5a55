"""Refuses deployments of versions whose provider is at an address that is not allowed.

`inference` makes the check that counts, on the address that it connects to. This one
reports the error when the version is deployed.
"""

from __future__ import annotations

import asyncio
import socket

from libs.errors import FailedPrecondition
from libs.http_client import AddressPolicy, Url
from services.registry.domain import ModelVersion

LOOKUP_SECONDS = 3.0


class ProviderHosts:
    """Where providers may be."""

    def __init__(self, policy: AddressPolicy) -> None:
        self._policy = policy

    async def check(self, version: ModelVersion) -> None:
        """Checks that a version may be deployed.

        A name that this machine cannot look up passes: a proxy may know it.

        Raises:
            FailedPrecondition: a provider runs it, and none of its addresses is allowed.
        """
        if version.provider is None:
            return
        try:
            host = Url.parse(version.provider.base_url).host
        except ValueError:
            raise _refused("the URL of the provider is not valid", host="") from None
        addresses = await _addresses(host)
        if addresses and not any(self._policy.allows(address) for address in addresses):
            raise _refused(
                f"{host} has no address that is allowed for providers: allow its network with "
                "HEADRACE_PROVIDER_ALLOWED_NETWORKS",
                host=host,
            )


async def _addresses(host: str) -> list[str]:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(LOOKUP_SECONDS):
            found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, RuntimeError):  # timeouts are among the first; the last: uvloop
        return []
    return [str(address[0]) for *_, address in found]


def _refused(message: str, *, host: str) -> FailedPrecondition:
    return FailedPrecondition(
        message, reason="PROVIDER_ADDRESS_NOT_ALLOWED", metadata={"host": host}
    )
