"""What users may read of an error message."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.redaction import MAX_TEXT_LENGTH, public_text, redact

DIGEST = "sha256:" + "a1" * 32
WORDS = [
    "connect to", "10.1.2.3:8001", "[::1]:80", "::1", "registry:50051", "api.example.com", "'", '"',
    "https://a.b/c?key=d", "/home/ann/x.py", "'/with a space/y'", "Bearer abc", "api_key=abc", " ",
    "sk-0123456789ab", "<path>", "<secret>", "C:\\x\\y", "~/.config", "=", ":", ",", DIGEST, "\n",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("last error: ipv4:127.0.0.1:4001: refused", "last error: <address> refused"),
        ("connect to 10.0.0.1 or 10.0.0.1:80", "connect to <address> or <address>"),
        ("at [::1]:8001, fe80::1", "at <address>, <address>"),
        ("registry.mesh.internal:5000 refused", "<address> refused"),
        ("registry:50051 refused", "<address> refused"),
        ("cannot resolve api.example.com", "cannot resolve <address>"),
        ("GET https://ann:pw@example.com/v1?key=abc failed", "GET <address> failed"),
        ("no space left: '/home/ann/a b/x.tar'", "no space left: <path>"),
        ("At:\n  /srv/models/1/model.py(12): execute", "At:\n  <path>(12): execute"),
        (r"open C:\Users\ann\x failed", "open <path> failed"),
        ("read ~/.netrc", "read <path>"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer <secret>"),
        ("HF_TOKEN=abc failed", "HF_TOKEN=<secret> failed"),
        ('{"api_key": "abc", "n": 1}', '{"api_key": "<secret>", "n": 1}'),
        ("key sk-0123456789abcdef is wrong", "key <secret> is wrong"),
        ("key 0123456789abcdef0123456789abcdef", "key <secret>"),
        ("token eyJhbGciOiJFUzI1NiJ9.e30.c2ln", "token <secret>"),
    ],
)
def test_addresses_paths_and_secrets_are_removed(text, expected):
    """The messages come from Triton, from models, from the operating system and from gRPC."""
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "ValueError: no such weights (try 2)",
        f"has the digest {DIGEST}",
        "input 'text' of alpha-1.0.0-0123456789ab: expected shape [1, 384], got 3/4 and/or none",
        "std::bad_alloc at 12:34:56 in torch.nn.functional.embedding, model.py:12",
        "tokenizer: not found; token_count: 3",
        "the artifact holds '../../evil', which leads out of its folder",
    ],
)
def test_what_helps_a_user_stays(text):
    """Otherwise the reason for the failure of a backend would be lost."""
    assert redact(text) == text


@given(st.text() | st.lists(st.sampled_from(WORDS)).map("".join))
def test_a_redacted_text_stays_as_it_is(text):
    """Agents redact before they report; a registry that changed it again would get it again."""
    assert public_text(public_text(text)) == public_text(text)


def test_a_text_is_cut_and_searched_in_bounded_time():
    """A model may print megabytes; PostgreSQL accepts no NUL."""
    assert len(public_text("x " * 10_000_000)) == MAX_TEXT_LENGTH
    assert len(public_text("'/" * 10_000_000)) <= MAX_TEXT_LENGTH
    assert public_text("a\0b") == "a\ufffdb"
