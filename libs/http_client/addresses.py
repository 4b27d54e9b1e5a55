"""Which addresses may be connected to: by default those of the public internet only.

A URL comes from who deploys. Without this check it could lead to this machine's own ports, to other
machines of its network, or to the metadata of a cloud, which has credentials.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self, TypeAlias

from libs.http_client.response import HttpError

Address: TypeAlias = "ipaddress.IPv4Address | ipaddress.IPv6Address"
Network: TypeAlias = "ipaddress.IPv4Network | ipaddress.IPv6Network"

_PRIVATE: Sequence[Network] = [
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
]
# The metadata service of a cloud, in the range of private addresses.
_METADATA: Sequence[Network] = [ipaddress.ip_network("fd00:ec2::/32")]
# Other IPv6 addresses are for special uses, also those that `is_global` does not know.
_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_IPV4_BITS = 0xFFFFFFFF


class AddressRefusedError(HttpError):
    """No address of a host may be connected to."""


@dataclass(frozen=True)
class AddressPolicy:
    """What is allowed besides public addresses.

    Attributes:
        networks: these networks, whatever is in them.
        private: the networks for private use: 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16, fc00::/7.
    """

    networks: Sequence[Network] = field(default=())
    private: bool = False

    @classmethod
    def parse(cls, networks: str, *, private: bool) -> Self:
        """Reads networks that are separated by commas.

        Raises:
            ValueError: one is invalid.
        """
        try:
            return cls(
                tuple(
                    ipaddress.ip_network(text.strip())
                    for text in networks.split(",")
                    if text.strip()
                ),
                private,
            )
        except ValueError as error:
            raise ValueError(
                f"allowed networks must be like 10.1.0.0/16, separated by commas: {error}"
            ) from error

    def allows(self, address: str) -> bool:
        """Returns whether an address may be connected to.

        Args:
            address: as the system resolves a name to it, maybe with a zone, `fe80::1%eth0`.
        """
        found = ipaddress.ip_address(address.partition("%")[0])
        # An address can lead to another one that it contains: both must be allowed.
        return all(self._allows(each) for each in (found, *_embedded(found)))

    def _allows(self, address: Address) -> bool:
        if any(address in network for network in self.networks):
            return True
        if self.private and any(address in network for network in _PRIVATE):
            return not any(address in network for network in _METADATA)
        if isinstance(address, ipaddress.IPv6Address) and _embedded(address):
            return True  # the addresses in it decide
        if isinstance(address, ipaddress.IPv6Address) and address not in _UNICAST:
            return False
        return address.is_global and not address.is_multicast


def _embedded(address: Address) -> list[Address]:
    """Returns the IPv4 addresses that an IPv6 address leads to: mapped, 6to4, Teredo, NAT64."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    if address.sixtofour is not None:
        return [address.sixtofour]
    if address.teredo is not None:
        return list(address.teredo)
    if address in _NAT64:
        return [ipaddress.IPv4Address(int(address) & _IPV4_BITS)]
    return []
