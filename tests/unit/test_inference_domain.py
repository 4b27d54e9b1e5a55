"""A chat call and what is delivered of its answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from libs.chat.request import GenerationRequest, Message
from libs.errors import InvalidArgument
from services.inference.domain import ChatCall, Chunk, Delivered, Finish

GOOD = GenerationRequest(model="smollm2", messages=(Message("user", "hello"),))


def call(**fields: Any) -> ChatCall:
    return ChatCall(request_id="", request=replace(GOOD, **fields))


def test_a_valid_call_passes():
    """The least that a call needs is a model and one message."""
    call().check()


def test_all_wrong_fields_are_reported_at_once():
    """Users fix a request once, not field by field."""
    with pytest.raises(InvalidArgument) as caught:
        call(model="", messages=(), top_p=2).check()
    assert [field for field, _ in caught.value.field_violations] == ["model", "messages", "top_p"]


def test_more_tokens_than_the_model_generates_are_refused():
    """A limit that cannot be kept is an error; without one there is a default."""
    assert call().max_tokens_for(64) == 64
    assert call().max_tokens_for(4096) == 256
    with pytest.raises(InvalidArgument):
        call(max_tokens=65).max_tokens_for(64)


def test_delivered_tokens_are_kept_as_ids_or_as_text_where_ids_are_missing():
    """An engine resumes from exact ids; text is used only if the engine did not report some."""
    delivered = Delivered()
    assert delivered.add(Chunk("ab", (1, 2), 2))
    assert delivered.add(Chunk("😀", (7,), 3))
    assert delivered.segments == [1, 2, "😀"]
    assert delivered.token_count == 5


def test_a_chunk_after_which_no_engine_could_continue_waits_for_the_next_one():
    """A token without text and id, unless it is the last: counted alone, it would come again."""
    delivered = Delivered()
    half = Chunk("", (), 1)
    assert not delivered.add(half)
    assert (delivered.segments, delivered.token_count) == ([], 0)
    assert delivered.add(half.followed_by(Chunk("😀", (7,), 1)))
    assert (delivered.segments, delivered.token_count) == (["😀"], 2)
    assert delivered.add(Chunk("", (8,), 1))  # a token without text that has an id
    assert delivered.add(Chunk("", (), 1, Finish("length", 1, 4, 0)))
    assert (delivered.segments, delivered.token_count) == (["😀", 8], 4)
