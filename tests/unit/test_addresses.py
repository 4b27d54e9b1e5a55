"""Addresses inside a mesh, and what may be reached without certificates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from libs.addresses import authority, host_and_port, one_target, unix_path
from libs.config import ServiceSettings


def test_both_forms_are_told_apart():
    """A socket has a path, a port a host."""
    assert unix_path("unix:/run/a b.sock") == "/run/a b.sock"
    assert unix_path("127.0.0.1:80") is None
    assert host_and_port("[::1]:80") == ("::1", 80)
    assert authority("unix:/run/ä") == "localhost"
    assert authority("host:80") == "host:80"


@pytest.mark.parametrize("address", ["", "80", ":80", "host", "host:", "host:http"])
def test_other_texts_are_no_addresses(address: str):
    """The message says which forms there are."""
    with pytest.raises(ValueError, match="use host:port or unix:/path"):
        host_and_port(address)


def test_several_addresses_are_one_target():
    """In the forms in which gRPC balances over them."""
    assert one_target(["unix:/a"]) == "unix:/a"
    assert one_target(["unix:/a", "unix:/b"]) == "unix:/a,/b"
    assert one_target(["1.2.3.4:1", "1.2.3.4:2"]) == "ipv4:1.2.3.4:1,1.2.3.4:2"


class Settings(ServiceSettings):
    """With a peer and a bus."""

    peer_address: str
    nats_url: str
    further_address: str | None = None


def settings(**changes: Any) -> Settings:
    given: dict[str, Any] = {
        "home": Path("/x"),
        "listen_address": "unix:/x/a",
        "metrics_address": "127.0.0.1:1",
        "input_hash_key_file": Path("/x/key"),
        "peer_address": "unix:/x/b",
        "nats_url": "nats://127.0.0.1:4222",
        "tls_ca_file": Path("/x/ca"),
        "tls_certificate_file": Path("/x/certificate"),
        "tls_key_file": Path("/x/key"),
    }
    return Settings(**{**given, **changes})


NO_TLS: dict[str, Any] = dict.fromkeys(("tls_ca_file", "tls_certificate_file", "tls_key_file"))


def test_with_certificates_any_address_is_good():
    """All connections over TCP are secured then."""
    found = settings(listen_address="10.0.0.1:1", peer_address="10.0.0.2:1")
    assert found.tls is not None
    assert found.tls.ca == Path("/x/ca")


def test_without_certificates_exposed_addresses_are_named():
    """Both where it listens and where it calls; not what only metrics are read from."""
    with pytest.raises(ValidationError) as refused:
        settings(**NO_TLS, peer_address="10.0.0.2:1")
    text = str(refused.value)
    assert "HEADRACE_PEER_ADDRESS, HEADRACE_NATS_URL: without TLS" in text
    assert "HEADRACE_LISTEN_ADDRESS" not in text
    assert "METRICS" not in text


def test_sockets_need_no_certificates():
    """The kernel knows who calls."""
    assert settings(**NO_TLS, nats_url="unix:/x/nats").tls is None


def test_an_address_that_is_not_set_exposes_nothing():
    """Some servers are optional."""
    assert settings(**NO_TLS, nats_url="unix:/x/nats", further_address=None).tls is None
    with pytest.raises(ValidationError, match="HEADRACE_FURTHER_ADDRESS: without TLS"):
        settings(**NO_TLS, nats_url="unix:/x/nats", further_address="10.0.0.2:1")


def test_plaintext_must_be_asked_for():
    """By a setting of its own."""
    assert settings(**NO_TLS, plaintext=True, listen_address="0.0.0.0:1").tls is None


def test_certificates_are_complete():
    """One file alone would be used for nothing."""
    with pytest.raises(ValidationError, match="must be set together"):
        settings(tls_key_file=None)
