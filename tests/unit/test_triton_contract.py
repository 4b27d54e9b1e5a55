"""Requests of the chat model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.model_code import load_module

contract = load_module("smollm2", "contract")

HELLO = [{"role": "user", "content": "Hello"}]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def reason_of(raw: Any) -> str:
    """Returns why a request is refused; empty if it is not."""
    try:
        contract.parse_request(raw)
    except contract.ModelError as error:
        return str(error.reason)
    return ""


def parse(**fields: Any) -> Any:
    return contract.parse_request(json.dumps({"messages": HELLO, "max_tokens": 5, **fields}))


def test_what_is_not_given_has_its_default():
    """Greedy, without stop sequences, from the start."""
    request = parse()
    assert (request.operation, request.temperature, request.top_p) == ("generate", 0.0, 1.0)
    assert (request.seed, request.stop, request.resume) == (None, (), ())


def test_a_resumed_request_may_mix_ids_and_text():
    """Empty text says nothing and is dropped: the engine would take it for a token."""
    assert parse(resume={"pieces": [1, "🌊", "", 2]}).resume == (1, "🌊", 2)


def test_counting_needs_only_messages():
    """No limits are looked at."""
    raw = json.dumps({"operation": "count_tokens", "messages": HELLO})
    assert contract.parse_request(raw).operation == "count_tokens"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", None),
        ("max_tokens", True),
        ("max_tokens", 1.5),
        ("temperature", "hot"),
        ("temperature", -0.1),
        ("top_p", 1.1),
        ("seed", 1.5),
        ("stop", "one"),
        ("stop", ["a"] * 17),
        ("operation", "sing"),
        ("messages", "Hello"),
        ("resume.pieces", None),
    ],
)
def test_a_wrong_field_is_named(field, value):
    """The caller can fix it."""
    fields = {"resume": {"pieces": value}} if "." in field else {field: value}
    with pytest.raises(contract.ModelError) as caught:
        parse(**fields)
    assert caught.value.reason == "INVALID_FIELD"
    assert caught.value.metadata["field"] == field


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("messages[0].content", {"messages": [{"role": "user", "content": "a\ud800"}]}),
        ("stop", {"stop": ["\udfff"]}),
        ("resume.pieces", {"resume": {"pieces": [1, "\ud83d"]}}),
    ],
)
def test_half_a_character_is_refused(field, fields):
    """JSON can hold it, UTF-8 cannot: the engine would fail, which looks like its fault."""
    with pytest.raises(contract.ModelError) as caught:
        parse(**fields)
    assert caught.value.metadata["field"] == field


def test_deep_json_is_refused():
    """Python's parser gives up on it in its own way."""
    assert reason_of("[" * 100_000) == "INVALID_FIELD"


def test_the_cache_salt_is_not_in_the_request():
    """Else callers could choose it."""
    assert parse(cache_salt="theirs").cache_salt == ""
    raw = json.dumps({"messages": HELLO, "max_tokens": 5})
    assert contract.parse_request(raw, cache_salt="mine").cache_salt == "mine"


@given(JSON)
def test_whatever_comes_is_read_or_refused(body):
    """No input makes the model fail in another way."""
    assert reason_of(json.dumps(body)) in ("", "INVALID_FIELD")


@given(st.binary(max_size=20))
def test_bytes_that_are_no_json_are_refused(raw):
    """Not UTF-8, not JSON, or no object."""
    with pytest.raises(contract.ModelError):
        contract.parse_request(raw)


@pytest.mark.parametrize("field", ["messages", "max_tokens", "resume", "stop", "temperature"])
@given(value=JSON)
def test_whatever_a_field_has_is_read_or_refused(field, value):
    """Likewise deeper inside."""
    body = {"messages": HELLO, "max_tokens": 5, field: value}
    assert reason_of(json.dumps(body)) in ("", "INVALID_FIELD")
