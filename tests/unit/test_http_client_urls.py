"""URLs are compared by what they mean, and those that parsers disagree about are refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.http_client import HttpClient, Url

OPENAI = Url.parse("https://api.openai.com/v1")


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("https://api.openai.com/v1/", "https://api.openai.com/v1"),
        ("HTTPS://API.OpenAI.com:443/v1", "https://api.openai.com/v1"),
        ("https://api.openai.com./v1", "https://api.openai.com/v1"),
        ("http://host:80", "http://host"),
        ("http://host:8080/", "http://host:8080"),
        ("https://bücher.example/a", "https://xn--bcher-kva.example/a"),
        ("http://127.0.0.1:1", "http://127.0.0.1:1"),
        ("http://[0:0:0:0:0:0:0:1]:1/x", "http://[::1]:1/x"),
        ("http://[::FFFF:7F00:1]", "http://[::ffff:7f00:1]"),
        ("https://host/a%20b/c.d/~e", "https://host/a%20b/c.d/~e"),
    ],
)
def test_a_url_has_one_spelling(text: str, canonical: str):
    """Case of the host, default port, dot and slash at the end, and IDN make no difference."""
    url = Url.parse(text)
    assert str(url) == canonical
    assert Url.parse(canonical) == url


@pytest.mark.parametrize(
    "text",
    [
        "", "api.openai.com", "//api.openai.com", "ftp://host", "file:///etc/passwd", "https:host",
        "https:/host", "https:///host", "https://", "https://:443", "https://host:", "https://host:0",
        "https://host:65536", "https://host:x", "https://user@host", "https://u:p@host", "https://@host",
        "https://host?q", "https://host/#f", "https://api.openai.com\\@evil.org", "https:\\\\host",
        "https://host\\.evil.org", "https://ho st", "https://host/\n", "\thttps://host", "https://host\x00",
        "https://host/a/../b", "https://host/./b", "https://host/%2e%2E/b", "https://host/a//b",
        "https://host/a%2fb", "https://host/a%5cb", "https://host/%252e%252e/", "https://host/ä",
        "https://a..b", "https://.a", "https://-a", "https://a_-", "https://a%62", "https://a,b",
        "https://[::1",
        "https://[::1]x", "https://[fe80::1%25eth0]", "https://" + "a" * 64,
        "https://h/" + "a" * 2048,
        # Spellings of addresses that some libraries accept.
        "http://127.1", "http://2130706433", "http://0x7f000001", "http://0x7f.0.0.1",
        "http://0177.0.0.1",
        "http://127.0.0.1.", "http://127.0.0.01", "http://1.2.3", "http://127.0.0.0x1", "http://1.2.3.4.5",
        "http://0x", "http://127.0.0.1\u3002",
    ],
)  # fmt: skip
def test_an_odd_url_is_refused(text: str):
    """Also those that only some parsers would read in another way."""
    with pytest.raises(ValueError):  # noqa: PT011 - of several kinds
        Url.parse(text)


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("https://api.openai.com/v1", True),
        ("https://api.openai.com/v1/eu", True),
        ("https://API.OPENAI.COM:443/v1/", True),
        ("https://api.openai.com", False),
        ("https://api.openai.com/", False),
        ("https://api.openai.com/v10", False),
        ("https://api.openai.com/V1", False),
        ("https://api.openai.com/v2/v1", False),
        ("http://api.openai.com/v1", False),
        ("https://api.openai.com:444/v1", False),
        ("https://api.openai.com.evil.org/v1", False),
        ("https://evil.org/api.openai.com/v1", False),
        ("https://openai.com/v1", False),
        ("https://\u0430pi.openai.com/v1", False),  # a Cyrillic letter
    ],
)
def test_a_prefix_ends_at_a_part_of_the_path(text: str, inside: bool):
    """And it has the same scheme, host and port."""
    assert Url.parse(text).is_within(OPENAI) is inside
    assert Url.parse(text).is_within(Url.parse("https://api.openai.com")) is (
        text.lower().startswith("https://api.openai.com")
        and "evil" not in text
        and "444" not in text
    )


_PARTS = st.sampled_from(
    [
        "http", "https", "://", "/", "//", "\\", ":", "@", "?", "#", ".", "..", "%2e", "%2f", "%",
        "[", "]", "::1", "127.0.0.1", "127.1", "0x7f", "api.openai.com", "evil.org", "v1", "443",
        "80", "0", " ", "\t", "\u3002", "\u00df", "\u0130", "xn--", "-", "_", "A",
    ]
)  # fmt: skip


@settings(max_examples=2000, deadline=None)
@given(st.lists(_PARTS, max_size=9), st.booleans())
def test_what_is_accepted_means_the_same_to_the_client(parts: list[str], prefixed: bool):
    """The key's check and the connection read one text: they must not see different hosts."""
    text = ("https://api" if prefixed else "") + "".join(parts)
    try:
        url = Url.parse(text)
    except ValueError:
        return
    assert Url.parse(str(url)) == url
    client = HttpClient(text, headers={}, connect_seconds=1, keep_alive_seconds=1)
    connector = client._connector
    assert connector._host.rstrip(".") == url.host
    assert (connector._port, connector._secure) == (url.port, url.scheme == "https")
