"""The rules for requests to the embedding cache, and how hits are counted."""

from __future__ import annotations

import pytest

from libs.embedding_texts import MAX_TEXTS, MAX_TEXTS_BYTES, check_texts
from libs.errors import InvalidArgument
from services.embedding_cache.domain import (
    Lookup,
    Vector,
    check_dimensions,
    text_keys,
)

_DIGEST = "sha256:" + "ab" * 32


def _violation(texts: list[str]) -> tuple[str, str]:
    with pytest.raises(InvalidArgument) as caught:
        check_texts(texts, field="texts")
    return caught.value.reason, caught.value.field_violations[0][0]


def test_the_limits_are_inclusive():
    """Requests exactly at a limit are accepted."""
    check_texts(["a"], field="texts")
    check_texts(["a"] * MAX_TEXTS, field="texts")
    check_texts(["a" * (MAX_TEXTS_BYTES - 2), "é"], field="texts")


def test_requests_beyond_a_limit_are_refused_with_the_field():
    """No texts, too many, an empty text and too many bytes are errors of the caller."""
    assert _violation([]) == ("INVALID_FIELD", "texts")
    assert _violation(["a"] * (MAX_TEXTS + 1)) == ("INVALID_FIELD", "texts")
    assert _violation(["a", "", "b", ""]) == ("INVALID_FIELD", "texts[1]")
    assert _violation(["a" * (MAX_TEXTS_BYTES - 1), "é"]) == ("MESSAGE_TOO_LARGE", "texts")


def test_dimensions_must_be_those_of_the_model():
    """Vectors are not shortened, and a request for that is not ignored."""
    check_dimensions(None, 384)
    check_dimensions(384, 384)
    with pytest.raises(InvalidArgument) as caught:
        check_dimensions(256, 384)
    assert caught.value.field_violations[0][0] == "dimensions"


def test_a_key_identifies_artifact_owner_and_text():
    """Another artifact, owner or text has another key; all keys have the same size."""
    other = "sha256:" + "cd" * 32
    keys = [
        *text_keys(_DIGEST, "acme", ["a", "b", "á"]),
        *text_keys(_DIGEST, "beta", ["a"]),
        *text_keys(_DIGEST, "", ["a", "acmea"]),
        *text_keys(_DIGEST, "acmea", ["", "a"]),
        *text_keys(other, "acme", ["a"]),
    ]
    assert {len(key) for key in keys} == {64}
    assert len(set(keys)) == len(keys)
    assert text_keys(_DIGEST, "acme", ["b", "a"]) == [keys[1], keys[0]]


def test_texts_that_were_not_computed_are_hits():
    """Tokens of hits count as cached, those of computed texts do not."""
    lookup = Lookup([Vector(b"", 3), Vector(b"", 5), Vector(b"", 3)], computed=frozenset({0}))
    assert (lookup.hit_count, lookup.token_count, lookup.cached_token_count) == (2, 11, 8)
