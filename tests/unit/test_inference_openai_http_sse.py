"""The parser of a provider's answers."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.backends.openai_http.errors import read_error
from services.inference.backends.openai_http.sse import (
    CompletionStreamParser,
    Usage,
    read_completion,
)
from services.inference.domain import BackendFailedError, Finish

USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 3}}


def chunk(text: str | None = None, finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"id": "c", "object": "chat.completion.chunk", "choices": [choice], **more}


def event(value: Any, end: str = "\n", **dumping: Any) -> bytes:
    data = value if isinstance(value, str) else json.dumps(value, **dumping)
    return f"data: {data}{end}{end}".encode()


def read(stream: bytes, *cuts: int) -> tuple[str, CompletionStreamParser]:
    """Feeds a stream, split at the cuts."""
    events, text = CompletionStreamParser(), ""
    edges = [0, *sorted(cuts), len(stream)]
    for start, stop in pairwise(edges):
        text += events.feed(stream[start:stop]).text
    return text, events


END = event(chunk(finish_reason="stop")) + event({"choices": [], "usage": USAGE}) + event("[DONE]")


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=12),
    layouts=st.lists(st.integers(0, 3), min_size=12, max_size=12),
    cuts=st.lists(st.integers(0, 4000), max_size=20),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_any_texts_split_anywhere_are_read_as_they_were_written(texts, layouts, cuts, end):
    """Quotes, escapes, all scripts, changing layouts, both line ends, every cut."""
    stream = b": welcome\n\n"
    for index, (text, layout) in enumerate(zip(texts, layouts, strict=False)):
        dumping = {"ensure_ascii": layout == 1, "separators": (",", ":") if layout == 2 else None}
        stream += event(chunk(text, created=index if layout == 3 else 0), end, **dumping)
    stream += END
    got, events = read(stream, *(cut % len(stream) for cut in cuts))
    assert got == "".join(texts)
    assert events.done
    assert events.chunks == sum(bool(text) for text in texts)
    assert events.finish() == Finish("stop", 7, 5, 3)


def test_other_strings_are_not_taken_for_the_text():
    """Reasoning, nested contents and text that looks like JSON are read as what they are."""
    stream = b"".join(
        [
            event(chunk(None) | {"choices": [{"delta": {"reasoning_content": "hm"}}]}),
            event(chunk("a", note={"content": "a"})),
            event(chunk("b", note={"content": "x"})),
            event(chunk("c")),
            event(chunk('d", "finish_reason": "stop')),
            event(chunk("e")),
        ]
    )
    text, events = read(stream + END)
    assert text == 'abcd", "finish_reason": "stope'
    assert events.chunks == 6


def test_unknown_fields_and_events_are_skipped():
    """Providers add fields and kinds of events of their own."""
    stream = (
        event({"type": "ping", "retry": 3})
        + b"event: ping\nid: 7\ndata: {}\n\n"
        + event(chunk("a", new={"x": [1]}))
        + event({"choices": [{"delta": {"content": "b", "audio": {}}, "logprobs": None}]})
        + event({"choices": [], "usage": {**USAGE, "audio_tokens": 3, "total": "12"}})
        + event(chunk(finish_reason="stop", service_tier="flex"))
    )
    text, events = read(stream + event("[DONE]"))
    assert text == "ab"
    assert events.finish() == Finish("stop", 7, 5, 3)


def test_a_surrogate_pair_split_between_events_becomes_one_character():
    """JSON may escape a character as two surrogates; a lone one is replaced."""
    halves = event('{"choices":[{"delta":{"content":"a\\ud83d"}}]}') + event(
        '{"choices":[{"delta":{"content":"\\ude00b"}}]}'
    )
    for cut in range(len(halves)):
        assert read(halves, cut)[0] == "a😀b"
    lone = event('{"choices":[{"delta":{"content":"\\ude00"}}]}')
    assert read(lone)[0] == "\ufffd"


def test_without_usage_chunks_are_counted():
    """Nothing is estimated, and the parser reports that there was no usage."""
    stream = event(chunk("a")) * 4 + event(chunk(finish_reason="eos_token")) + event("[DONE]")
    _, events = read(stream)
    assert events.usage is None
    assert events.finish() == Finish("stop", 0, 4, 0)


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": -1, "completion_tokens": 1},
        {"prompt_tokens": "7", "completion_tokens": 1},
        {"prompt_tokens": 1},
        {"prompt_tokens": True, "completion_tokens": 2**40},
    ],
)
def test_invalid_usage_is_ignored(usage):
    """Counts are integers that fit the usage record."""
    _, events = read(event(chunk("a")) + event({"choices": [], "usage": usage}))
    assert events.usage is None


@pytest.mark.parametrize(
    "stream",
    [
        event("no JSON"),
        event("[]"),
        event('{"choices": {"index": 0}}'),
        event('{"choices": [[]]}'),
        event('{"choices": [{"delta": "x"}]}'),
        event('{"choices": [{"delta": {"content": 3}}]}'),
        event({"error": {"message": "overloaded", "code": 503}}),
        event("[" * 100_000),
        b"data: \xff\xfe\n\n",
        b"x" * (1024 * 1024 + 1),
    ],
)
def test_a_malformed_stream_is_the_backends_fault(stream):
    """Also after valid events."""
    events = CompletionStreamParser()
    events.feed(event(chunk("a")) * 2)
    with pytest.raises(BackendFailedError):
        events.feed(stream)


def test_a_stream_without_a_finish_reason_is_incomplete():
    """Whatever was read before."""
    _, events = read(event(chunk("a")))
    assert not events.done
    with pytest.raises(BackendFailedError):
        events.finish()


def test_an_answer_in_one_object_is_read():
    """With its usage, or as one token without."""
    body = {"choices": [{"message": {"content": "hé"}, "finish_reason": "length"}]}
    answer = read_completion(json.dumps(body | {"usage": USAGE}).encode())
    assert answer == ("hé", Usage(7, 5, 3), Finish("length", 7, 5, 3))
    assert read_completion(json.dumps(body).encode())[1:] == (None, Finish("length", 0, 1, 0))


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b'{"choices": [{"message": {}}]}'])
def test_an_invalid_object_is_the_backends_fault(body):
    """A page of a proxy, an empty body, an answer without a finish reason."""
    with pytest.raises(BackendFailedError):
        read_completion(body)


def test_error_bodies_are_read():
    """OpenAI's shape, the flat one of others, or none."""
    assert read_error(b'{"error": {"message": "m", "code": "c"}}') == ("m", "c", "")
    assert read_error(b'{"message": "m", "code": 400, "param": "p"}') == ("m", "400", "p")
    assert read_error(b"<html>") == ("", "", "")
    assert read_error(b'{"error": "m"}') == ("m", "", "")
    assert read_error(b"[1]") == ("", "", "")
