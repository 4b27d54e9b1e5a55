"""JSON that is odd, huge or not JSON at all, in the bodies of OpenAI's API."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from headrace.inference.v1 import inference_pb2

from libs.chat import wire
from libs.errors import InvalidArgument
from libs.openai import fields
from libs.openai.chat_request import parse_chat_completion
from libs.openai.errors import error_object
from libs.rpc.field_count import has_more_fields
from libs.rpc.served_call import MAX_FIELDS, MAX_REQUEST_BYTES, read_message
from libs.rpc.status import to_status
from services.embedding_cache.openai import parse_embedding_request

# On a quiet machine; the tests allow ten times as much.
LONGEST_STALL_SECONDS = 0.1
_CHAT = b'{"model": "m", "messages": [{"role": "user", "content": "a"}]'


def _refused(body: bytes) -> InvalidArgument:
    """Returns the error of a body; it can be sent in both forms."""
    errors = []
    for parse in (parse_chat_completion, parse_embedding_request):
        with pytest.raises(InvalidArgument) as raised:
            parse(body)
        errors.append(raised.value)
        json.dumps(error_object(raised.value)).encode()
        assert to_status(raised.value).SerializeToString()
    return errors[0]


@pytest.mark.parametrize(
    "member",
    [
        b'"\\ud800": 1',
        b'"a\\udfff": 1',
        b'"metadata": {"\\ud800": "a"}',
        b'"metadata": [{"a": {"\\udc00x": 1}}]',
        b'"\\ud800\\ud800": 1',
    ],
)
def test_half_a_surrogate_pair_in_a_key_is_refused(member):
    """At any depth; it cannot be encoded, not even in the error."""
    assert _refused(_CHAT + b", " + member + b"}").field_violations[0][0] == "body"


def test_an_error_that_quotes_half_of_a_surrogate_pair_can_be_sent():
    """Whichever rule finds it."""
    error = InvalidArgument.of_field("a\ud800", "is \udfff")
    assert to_status(error).message == "a\\ud800: is \\udfff"
    assert error_object(error)["error"]["param"] == "a\\ud800"


@pytest.mark.parametrize(
    "body",
    [
        b'{"temperature": NaN}',
        b'{"temperature": -Infinity}',
        b'{"temperature": 1e400}',
        b'{"temperature": -1e400}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"a": ' + b"[" * 100_000,
        b'{"a": ' + b"[" * 2000 + b"]" * 2000 + b"}",
        b'{"a":' * 30_000,
        b"\xef\xbb\xbf{}",
        b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}',
        b'{"a": "\x00"}',
        b'{"a": 01}',
        b'{"a": "\\x"}',
        b"{}{}",
        b"{,}",
        b"",
        b"null",
        b'"a"',
        b"\x00" * 100,
        '{"a": 1}'.encode("utf-16"),
    ],
    ids=lambda body: f"{len(body)} {body[:12]!r}",
)
def test_what_is_not_a_json_object_is_refused(body):
    """It is the caller's error, not an internal one."""
    assert _refused(body).field_violations[0][0] == "body"


def test_the_last_of_two_members_of_a_name_counts():
    """As in most parsers, and in both of ours."""
    for odd in (b"", b', "user": "\\ud800"'):  # makes the slower parser read it
        body = _CHAT.replace(b'"m"', b'"m", "model": "n"') + odd + b"}"
        assert parse_chat_completion(body).model == "n"


def test_a_key_may_be_long():
    """The error is cut."""
    error = _refused(b'{"' + b"k" * 1_000_000 + b'": 1}')
    assert len(to_status(error).SerializeToString()) < 8192


def _filled(before: bytes, each: bytes, after: bytes) -> bytes:
    """Returns a body of the longest size with one thing again and again."""
    room = MAX_REQUEST_BYTES - len(before) - len(after)
    return before + (each * (room // len(each))).rstrip(b",") + after


MANY = {
    "messages": _filled(b'{"model":"m","messages":[', b"{},", b"]}"),
    "parts": _filled(b'{"model":"m","messages":[{"role":"user","content":[', b"{},", b"]}]}"),
    "lists": _filled(b'{"model":"m","metadata":[', b"[],", b"]}"),
    "stops": _filled(b'{"model":"m","stop":[', b'"",', b"]}"),
    "texts": _filled(b'{"model":"m","input":[', b'"",', b"]}"),
    "numbers": _filled(b'{"model":"m","input":[', b"1,", b"]}"),
    "keys": b"{" + b",".join(b'"%d":1' % key for key in range(300_000)) + b"}",
    "surrogates": _filled(b'{"model":"\\ud800","metadata":[', b"[],", b"]}"),
    "quotes": _filled(b'{"model":"', b'"', b""),
    "escapes": _filled(b'{"model":"' + b"[" * 40_000, b'\\"', b""),
    "nested": _filled(b'{"a":', b"[", b""),
}


@pytest.mark.parametrize("body", MANY.values(), ids=MANY)
def test_a_body_of_a_million_values_does_not_hold_up_others(body):
    """They are counted before they are parsed: 1.4 million messages took seconds."""
    began = time.perf_counter()
    _refused(body)  # twice
    assert time.perf_counter() - began < 20 * LONGEST_STALL_SECONDS


def test_a_text_may_look_like_many_values():
    """What is in strings does not count."""
    text = '[{"a": 1}, ' * 100_000
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]}).encode()
    assert len(body) > 2 * fields.MAX_VALUES
    assert parse_chat_completion(body).messages == (("user", text),)


def test_a_long_conversation_is_read():
    """As long as the rules of requests allow."""
    messages = [{"role": "user", "content": [{"type": "text", "text": "a" * 60}]}] * 1024
    body = json.dumps({"model": "m", "messages": messages}).encode()
    assert len(body) > 2 * fields.MAX_VALUES
    assert len(parse_chat_completion(body).messages) == 1024


def _generate(**more: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(model="m", **more)


@pytest.mark.parametrize(
    "request_bytes",
    [
        _filled(b"", b"\x1a\x00", b""),
        b"\x1a\x80\x80\x80\x01" + _filled(b"", b"\x12\x00", b"")[: 2 * 1024 * 1024],
    ],
    ids=["messages", "parts"],
)
def test_a_million_empty_messages_over_grpc_are_refused_at_once(request_bytes):
    """Before they are parsed, by their number; they took nine seconds and half a gigabyte."""
    began = time.perf_counter()
    with pytest.raises(InvalidArgument, match="fields"):
        read_message(inference_pb2.GenerateRequest.FromString, request_bytes)
    assert time.perf_counter() - began < 10 * LONGEST_STALL_SECONDS
    parsed = inference_pb2.GenerateRequest.FromString(request_bytes)
    assert len(parsed.messages) > 1024 or len(parsed.messages[0].parts) > 4096
    began = time.perf_counter()
    violations = wire.generation_request(parsed).violations()
    assert time.perf_counter() - began < 10 * LONGEST_STALL_SECONDS
    assert "messages" in dict(violations)
    assert len(violations) < 10


def _nested_bytes(count: int) -> bytes:
    """Returns a request with one message that has so many parts."""
    message = inference_pb2.Message(parts=[inference_pb2.Part(text="a" * 8)] * count)
    return _generate(messages=[message]).SerializeToString()


def test_fields_are_counted_wherever_they_are():
    """In messages in messages, behind fields that are malformed or unknown, in groups."""
    kind = inference_pb2.GenerateRequest.DESCRIPTOR
    many = _nested_bytes(10_000)  # a part is two fields, in two messages
    for before in (b"", b"\x0b", b"\x0b\x0c", b"\x1a\x01\xff", b"\x1a\x02\x0f\x00", b"\x7a\x00"):
        assert has_more_fields(before + many, kind, limit=19_999)
        assert not has_more_fields(before + many, kind, limit=20_010)
    assert has_more_fields(many + b"\xff", kind, limit=19_999)
    assert not has_more_fields(_generate().SerializeToString() + bytes(100), kind, limit=200)


def test_a_message_with_few_large_fields_is_parsed():
    """As long as a request may be."""
    asked = _generate(
        messages=[inference_pb2.Message(parts=[inference_pb2.Part(text="a" * 4_000_000)])]
    )
    assert read_message(type(asked).FromString, asked.SerializeToString()) == asked
    parsed = read_message(type(asked).FromString, _nested_bytes(MAX_FIELDS // 2 - 100))
    assert len(parsed.messages[0].parts) == MAX_FIELDS // 2 - 100
