"""The salts of tenants in the engines."""

from __future__ import annotations

from libs.telemetry.hashing import InputHasher
from services.inference.cache_salts import CacheSalts

KEY = b"0123456789abcdef0123456789abcdef"


def test_a_tenant_has_one_salt_in_every_process() -> None:
    """And no other tenant has it."""
    salt = CacheSalts(InputHasher(KEY)).of("acme")
    assert salt == CacheSalts(InputHasher(KEY)).of("acme")
    assert len(salt) == 32
    assert salt != CacheSalts(InputHasher(KEY)).of("other")


def test_no_input_is_logged_with_the_salt_of_a_tenant() -> None:
    """The log has a hash of the texts that a caller chooses, however many there are."""
    salt = CacheSalts(InputHasher(KEY)).of("victim")
    for texts in (["victim"], ["tenant", "victim"], ["prefix cache", "tenant", "victim"]):
        assert InputHasher(KEY).hash(*texts) != salt
