"""Estimates of work, the sizes that are accepted, and how much work backends get at once."""

from __future__ import annotations

import pytest
from headrace.common.v1.model_pb2 import ModelSchema

from libs.chat.request import GenerationRequest, Message
from libs.embedding_texts import MAX_BYTES_PER_TOKEN as TEXT_BYTES_PER_TOKEN
from libs.embedding_texts import check_text_sizes
from libs.errors import InvalidArgument
from services.inference.work import MAX_BYTES_PER_TOKEN, check_prompt, next_part, text_work
from services.inference.work_window import (
    DEFAULT_TARGET_SECONDS,
    MAX_WORK,
    MIN_WORK,
    WorkWindow,
)


def request(*texts: str) -> GenerationRequest:
    return GenerationRequest(model="m", messages=tuple(Message("user", text) for text in texts))


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized():
    """All messages count, in UTF-8; a model without a known context takes any."""
    schema = ModelSchema(context_tokens=10)
    limit = 10 * MAX_BYTES_PER_TOKEN
    assert check_prompt(request("a" * (limit - 2), "é"), schema) == limit
    with pytest.raises(InvalidArgument) as caught:
        check_prompt(request("a" * (limit - 1), "é"), schema)
    assert caught.value.reason == "MESSAGE_TOO_LARGE"
    assert caught.value.field_violations[0][0] == "messages"
    assert caught.value.metadata["limit_bytes"] == str(limit)
    check_prompt(request("a" * 10 * limit), ModelSchema())


def test_a_text_much_longer_than_what_a_model_takes_is_refused():
    """The error names the text; longer texts than the model takes are accepted and cut."""
    limit = 256 * TEXT_BYTES_PER_TOKEN
    check_text_sizes(["a" * limit], max_input_tokens=256, field="input")
    check_text_sizes(["a" * 10 * limit], max_input_tokens=0, field="input")
    with pytest.raises(InvalidArgument) as caught:
        check_text_sizes(["a", "é" * (limit // 2 + 1)], max_input_tokens=256, field="input")
    assert caught.value.field_violations[0][0] == "input[1]"
    assert caught.value.reason == "MESSAGE_TOO_LARGE"


def test_texts_are_divided_by_their_work():
    """A part has at least one text; what a model cuts off does not count."""
    assert text_work("a" * 4000, 256) == 256
    assert text_work("a" * 4000, 0) == 1002
    assert next_part(["a" * 4000] * 9, max_input_tokens=256, part_work=100) == (1, 256)
    assert next_part(["a" * 40] * 9, max_input_tokens=256, part_work=100) == (8, 96)
    assert next_part(["a" * 40] * 3, max_input_tokens=256, part_work=100) == (3, 36)


@pytest.mark.parametrize("tokens_per_second", [7_000, 500_000])
def test_the_window_finds_what_keeps_a_backend_busy(tokens_per_second):
    """On a slow one and on a fast one."""
    window = WorkWindow()
    for number in range(4000):
        noise = 0.7 + 0.6 * (number * 7 % 11) / 10
        window.learn(int(window.limit / 4), noise * window.limit / tokens_per_second)
    expected = max(MIN_WORK, DEFAULT_TARGET_SECONDS * tokens_per_second)
    assert expected / 2 < window.limit < 2 * expected


def test_the_window_has_limits():
    """However fast or slow a backend is; one request always fits."""
    window = WorkWindow()
    for _ in range(1000):
        window.learn(10**6, 0.0)
    assert window.limit == MAX_WORK
    for _ in range(1000):
        window.learn(10**6, 3600.0)
    assert window.limit == MIN_WORK
    window.started(10**9)
    assert not window.fits(1)
    window.ended(10**9)
    assert window.fits(10**9)
