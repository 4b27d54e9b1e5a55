"""Resume tokens."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.chat.resume import ResumePoint, fingerprint, parse_token, token_prefix


@given(
    st.integers(0, 2**32 - 1),
    st.from_regex(r"[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}(-rc\.1)?", fullmatch=True),
    st.integers(0, 10**9 - 1),
)
def test_a_token_has_the_values_of_its_parts(request: int, version: str, position: int) -> None:
    """And it is safe in URLs and headers."""
    token = f"{token_prefix(request, version)}{position}"
    assert parse_token(token) == ResumePoint(request, version, position)
    assert token.isascii()
    assert not set(token) & set("+/= \"'")


@given(st.text(max_size=60))
def test_anything_else_is_refused(text: str) -> None:
    """With `ValueError`, whatever it is."""
    with pytest.raises(ValueError, match=r"."):
        parse_token(text)


@pytest.mark.parametrize(
    "token",
    [
        "7",
        "",
        token_prefix(1, "1.0.0"),
        token_prefix(1, "1.0.0") + "-1",
        token_prefix(1, "1.0.0") + "1" * 10,
        base64.urlsafe_b64encode(b"\x02\0\0\0\x011.0.0x").decode() + ".1",
        base64.urlsafe_b64encode(b"\x01\0\0\0\x01\xff\xff\xff\xff").decode().rstrip("=") + ".1",
        "AAAAAAAAA.1",
    ],
)
def test_a_malformed_token_is_refused(token: str) -> None:
    """A number of tokens, no position, a negative or huge one, another format, no text."""
    with pytest.raises(ValueError, match=r"."):
        parse_token(token)


def test_the_fingerprint_differs_with_every_field() -> None:
    """Also where the same characters are divided differently."""
    fields = [["a", "bc"], ["ab", "c"], ["a", "bc", ""], ["a", "bd"], ["a", "bc", "None"]]
    assert len({fingerprint(each) for each in fields}) == len(fields)
