"""Which pages may call, as Envoy is told."""

from __future__ import annotations

import re
from typing import Any

import pytest

from deploy.envoy.cors import ALLOWED_HEADERS, Cors


def _allows(cors: Cors, origin: str) -> bool:
    def matches(matcher: dict[str, Any]) -> bool:
        if "exact" in matcher:
            return bool(matcher["exact"] == origin)
        return re.fullmatch(matcher["safe_regex"]["regex"], origin) is not None

    return any(matches(matcher) for matcher in cors.policy()["allow_origin_string_match"])


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:3000", True),
        ("http://localhost", True),
        ("https://127.0.0.1:8443", True),
        ("http://[::1]:3000", True),
        ("http://localhost.evil.example", False),
        ("http://localhost:3000.evil.example", False),
        ("http://127x0x0x1", False),
        ("https://evil.example", False),
        ("null", False),
    ],
)
def test_by_default_only_pages_of_this_machine_may_call(origin: str, allowed: bool) -> None:
    """Whatever their port is."""
    assert _allows(Cors(), origin) == allowed


def test_origins_are_exact() -> None:
    """Only `:*` stands for several, and `*` for all."""
    cors = Cors(origins=["https://app.example.com", "https://dev.example.com:*"])
    assert _allows(cors, "https://app.example.com")
    assert _allows(cors, "https://dev.example.com:8443")
    for other in (
        "https://app.example.com:8443",
        "http://app.example.com",
        "https://appxexample.com",
    ):
        assert not _allows(cors, other)
    assert _allows(Cors(origins=["*"]), "https://evil.example")


@pytest.mark.parametrize(
    "origin",
    ["app.example.com", "https://app.example.com/", "https://*.example.com", "https://a b"],
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    """The message says what is expected."""
    with pytest.raises(ValueError, match="use scheme://host"):
        Cors(origins=[origin])


def test_headers_of_known_clients_are_allowed_and_more_can_be() -> None:
    """Browsers refuse to send a header that the preflight does not allow."""
    allowed = Cors(headers=["x-mine", "authorization"]).policy()["allow_headers"].split(", ")
    assert allowed == [*ALLOWED_HEADERS, "x-mine"]
    assert {"x-stainless-timeout", "connect-protocol-version", "x-grpc-web"} <= set(allowed)
    with pytest.raises(ValueError, match="invalid header name"):
        Cors(headers=["a, b"])
    with pytest.raises(ValueError, match="negative"):
        Cors(max_age_seconds=-1)
