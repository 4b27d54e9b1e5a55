"""Reading a provider's answers."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.backends.openai_http.sse import (
    CompletionStreamParser,
    Usage,
    told_error,
    whole_answer,
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
    """Feeds a stream in the parts that the cuts make."""
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
def test_any_texts_cut_anywhere_are_read_as_they_were_written(texts, layouts, cuts, end):
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
    assert events.ending() == Finish("stop", 7, 5, 3)


def test_what_only_looks_like_text_is_not_learned():
    """Other strings of the event, thoughts and nested contents stay what they are."""
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


def test_a_character_in_two_escaped_halves_becomes_one():
    """JSON may cut a character beyond the first plane at its surrogates; a lone half is marked."""
    halves = event('{"choices":[{"delta":{"content":"a\\ud83d"}}]}') + event(
        '{"choices":[{"delta":{"content":"\\ude00b"}}]}'
    )
    for cut in range(len(halves)):
        assert read(halves, cut)[0] == "a😀b"
    lone = event('{"choices":[{"delta":{"content":"\\ude00"}}]}')
    assert read(lone)[0] == "\ufffd"


def test_without_usage_chunks_are_counted_and_that_is_known():
    """Nothing is estimated: the count of chunks is what there is."""
    stream = event(chunk("a")) * 4 + event(chunk(finish_reason="eos_token")) + event("[DONE]")
    _, events = read(stream)
    assert events.usage is None
    assert events.ending() == Finish("stop", 0, 4, 0)


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": -1, "completion_tokens": 1},
        {"prompt_tokens": "7", "completion_tokens": 1},
        {"prompt_tokens": 1},
        {"prompt_tokens": True, "completion_tokens": 2**40},
    ],
)
def test_usage_that_is_none_is_not_taken(usage):
    """Counts are whole numbers that fit the record of usage."""
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
def test_what_is_no_stream_of_chat_is_the_backends_fault(stream):
    """Also after events that were well."""
    events = CompletionStreamParser()
    events.feed(event(chunk("a")) * 2)
    with pytest.raises(BackendFailedError):
        events.feed(stream)


def test_a_cut_stream_has_no_ending():
    """An end without a finish reason is a cut, whatever was read before."""
    _, events = read(event(chunk("a")))
    assert not events.done
    with pytest.raises(BackendFailedError):
        events.ending()


def test_a_whole_answer_is_read():
    """With its usage, or as one chunk without."""
    body = {"choices": [{"message": {"content": "hé"}, "finish_reason": "length"}]}
    answer = whole_answer(json.dumps(body | {"usage": USAGE}).encode())
    assert answer == ("hé", Usage(7, 5, 3), Finish("length", 7, 5, 3))
    assert whole_answer(json.dumps(body).encode())[1:] == (None, Finish("length", 0, 1, 0))


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b'{"choices": [{"message": {}}]}'])
def test_what_is_no_whole_answer_is_the_backends_fault(body):
    """A page of a proxy, an empty body, an answer without an end."""
    with pytest.raises(BackendFailedError):
        whole_answer(body)


def test_the_error_of_a_body_is_told():
    """OpenAI's shape, the flat one of others, or none."""
    assert told_error(b'{"error": {"message": "m", "code": "c"}}') == ("m", "c", "")
    assert told_error(b'{"message": "m", "code": 400, "param": "p"}') == ("m", "400", "p")
    assert told_error(b"<html>") == ("", "", "")
    assert told_error(b'{"error": "m"}') == ("m", "", "")
    assert told_error(b"[1]") == ("", "", "")
