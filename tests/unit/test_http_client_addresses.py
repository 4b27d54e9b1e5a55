"""Which addresses are connected to."""

from __future__ import annotations

import pytest

from libs.http_client import AddressPolicy

PUBLIC = ["1.1.1.1", "8.8.8.8", "203.0.114.1", "2606:4700:4700::1111", "::ffff:8.8.8.8"]
PRIVATE = ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fd12:3456::1"]
PRIVATE_EMBEDDED = ["::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::1", "2002:c0a8:101::1"]
REFUSED = [
    "0.0.0.0",  # noqa: S104 - refused, not listened on
    "127.0.0.1", "127.1.2.3", "169.254.169.254", "100.64.0.1", "100.100.100.200",
    "192.0.0.192", "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1",
    "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "2001:db8::1",
    "100.127.255.255", "192.0.0.1", "198.19.255.255", "255.0.0.1",
    # The platforms and metadata of clouds.
    "168.63.129.16", "::ffff:168.63.129.16", "64:ff9b::a83f:8110", "2002:a83f:8110::1",
    "fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254",
    # IPv4 in IPv6.
    "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1",
    "2002:7f00:1::", "2002:a9fe:a9fe::1", "::ffff:0:127.0.0.1", "64:ff9b::6440:1",
    "64:ff9b::a9fe:a9fe", "64:ff9b::6464:64c8", "2002:6464:64c8::1", "2002:c612:1::1",
]  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str):
    """Without any setting."""
    assert AddressPolicy().allows(address)


@pytest.mark.parametrize("address", [*REFUSED, *PRIVATE, *PRIVATE_EMBEDDED])
def test_all_others_are_refused(address: str):
    """This machine, its networks, clouds' metadata, and addresses that lead to them."""
    assert not AddressPolicy().allows(address)


@pytest.mark.parametrize("address", REFUSED)
def test_private_networks_are_no_more_than_that(address: str):
    """The setting opens neither this machine nor the metadata of clouds."""
    policy = AddressPolicy(private=True)
    assert not policy.allows(address)
    assert all(policy.allows(each) for each in (*PRIVATE, *PRIVATE_EMBEDDED))


def test_networks_are_allowed_by_name():
    """Exactly these, in each spelling of their addresses."""
    policy = AddressPolicy.parse("127.0.0.0/8, fe80::/10,", private=False)
    allowed = ["127.0.0.1", "::ffff:127.0.0.1", "fe80::1%eth0", "1.1.1.1"]
    assert all(policy.allows(address) for address in allowed)
    assert not any(policy.allows(address) for address in ("::1", "10.0.0.1", "169.254.169.254"))


@pytest.mark.parametrize("address", ["168.63.129.16", "fd20:ce::254", "fd00:ec2::254"])
def test_the_platform_of_a_cloud_is_allowed_by_name_only(address: str):
    """Who names it means it."""
    assert AddressPolicy.parse(address, private=False).allows(address)


@pytest.mark.parametrize("text", ["localhost", "127.0.0.1/7", "10.0.0.0/33", "10.0.0.0;11.0.0.0"])
def test_an_invalid_network_is_refused(text: str):
    """The message shows the form."""
    with pytest.raises(ValueError, match=r"must be like 10\.1\.0\.0/16"):
        AddressPolicy.parse(text, private=False)
