"""The edge's variables of the environment: what they mean, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.envoy.limits import Limits
from deploy.errors import CliError
from deploy.local.edge_settings import EdgeSettings
from tests.support.certificates import Authority

_ACCEPTED = {"HEADRACE_EDGE_PLAINTEXT": "tokens-are-readable"}


def _of(**variables: str) -> EdgeSettings:
    return EdgeSettings.of({f"HEADRACE_EDGE_{name}": value for name, value in variables.items()})


def test_by_default_only_this_machine_can_call() -> None:
    """Without settings: loopback, no TLS, the limits as documented."""
    settings = EdgeSettings.of({})
    assert settings == EdgeSettings()
    assert settings.listen_address(8080) == settings.call_address(8080) == "127.0.0.1:8080"


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "10.0.0.7", "2001:db8::1"])  # noqa: S104 - nothing listens
def test_tokens_do_not_leave_the_machine_unencrypted(address: str) -> None:
    """Any address but loopback needs TLS, or the operator's word."""
    variables = {"HEADRACE_EDGE_ADDRESS": address}
    with pytest.raises(CliError, match="would cross the network unencrypted") as caught:
        EdgeSettings.of(variables).check()
    assert "HEADRACE_EDGE_PLAINTEXT=tokens-are-readable" in str(caught.value)
    with pytest.raises(CliError, match="must be 'tokens-are-readable' or unset"):
        EdgeSettings.of(variables | {"HEADRACE_EDGE_PLAINTEXT": "yes"})
    EdgeSettings.of(variables | _ACCEPTED).check()


def test_a_certificate_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    """Before anything is started or stopped."""
    certificate, key = Authority(tmp_path).issue(names=("edge.example",))
    other, _ = Authority(tmp_path).issue(names=("edge.example",))
    files = {name: tmp_path / name for name in ("certificate", "key", "other")}
    for file, data in zip(files.values(), (certificate, key, other), strict=True):
        file.write_bytes(data)

    def check(certificate_name: str) -> None:
        _of(
            ADDRESS="0.0.0.0",  # noqa: S104 - nothing listens
            TLS_CERTIFICATE=str(tmp_path / certificate_name),
            TLS_KEY=str(files["key"]),
        ).check()

    check("certificate")
    with pytest.raises(CliError, match="do not belong together"):
        check("other")
    with pytest.raises(CliError, match=r"cannot read .*none"):
        check("none")


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1", "[::1]"])
def test_loopback_needs_no_tls(address: str) -> None:
    """All loopback addresses, of IPv4 and of IPv6."""
    settings = _of(ADDRESS=address)
    settings.check()
    assert settings.is_loopback


@pytest.mark.parametrize(
    ("address", "listens", "called"),
    [
        ("0.0.0.0", "0.0.0.0:80", "127.0.0.1:80"),  # noqa: S104 - nothing listens
        ("::", "[::]:80", "[::1]:80"),
        ("::1", "[::1]:80", "[::1]:80"),
        ("10.0.0.7", "10.0.0.7:80", "10.0.0.7:80"),
    ],
)
def test_programs_of_this_machine_call_an_address_that_exists(
    address: str, listens: str, called: str
) -> None:
    """`0.0.0.0` and `::` are for listening only."""
    settings = EdgeSettings.of({"HEADRACE_EDGE_ADDRESS": address} | _ACCEPTED)
    assert settings.listen_address(80) == listens
    assert settings.call_address(80) == called


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"ADDRESS": "localhost"}, "must be an IP address of this machine"),
        ({"TLS_CERTIFICATE": "/c.pem"}, "set both"),
        ({"TLS_KEY": "/k.pem"}, "set both"),
        ({"HSTS_SECONDS": "1h"}, "HEADRACE_EDGE_HSTS_SECONDS must be a whole number"),
        ({"MAX_CONNECTIONS": "many"}, "HEADRACE_EDGE_MAX_CONNECTIONS must be a whole number"),
        ({"MAX_CONNECTIONS": "0"}, "max_connections must be positive"),
        ({"MAX_HEAP_MIB": "64"}, "max_heap_mib must be at least 128"),
        ({"CORS_ORIGINS": "app.example.com"}, "invalid origin"),
    ],
)
def test_invalid_settings_are_refused_by_name(variables: dict[str, str], complaint: str) -> None:
    """The message says which and what is expected."""
    with pytest.raises(CliError, match=complaint):
        _of(**variables)


def test_each_limit_has_a_variable() -> None:
    """Named like the limit."""
    found = _of(BODY_SECONDS="30", TENANT_REQUESTS_PER_SECOND="7", MAX_HEAP_MIB="256").limits
    assert found == Limits(body_seconds=30, tenant_requests_per_second=7, max_heap_mib=256)


def test_lists_are_separated_by_commas() -> None:
    """Spaces around the words do not count."""
    cors = _of(CORS_ORIGINS="https://a.example, https://b.example:*", CORS_HEADERS="X-Mine").cors
    assert list(cors.origins) == ["https://a.example", "https://b.example:*"]
    assert list(cors.headers) == ["x-mine"]
