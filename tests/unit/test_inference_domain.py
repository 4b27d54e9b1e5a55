"""The rules of a chat call."""

from __future__ import annotations

from dataclasses import replace

import pytest

from libs.errors import InvalidArgument
from services.inference.domain import ChatCall, Chunk, Delivered, Message

GOOD = ChatCall(request_id="", model="smollm2", turns=(Message("user", "hello"),))


def test_a_good_call_passes():
    """The least that a call needs is a model and one message."""
    GOOD.check()


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (replace(GOOD, model=""), "model"),
        (replace(GOOD, turns=()), "messages"),
        (replace(GOOD, turns=(Message("tool", "x"),)), "messages[0].role"),
        (replace(GOOD, max_tokens=0), "max_tokens"),
        (replace(GOOD, temperature=2.5), "temperature"),
        (replace(GOOD, temperature=float("nan")), "temperature"),
        (replace(GOOD, top_p=0), "top_p"),
        (replace(GOOD, seed=-1), "seed"),
        (replace(GOOD, stop=("",)), "stop[0]"),
        (replace(GOOD, stop=("a",) * 5), "stop"),
    ],
)
def test_a_wrong_field_is_named(call, field):
    """The violation has the path of the field."""
    with pytest.raises(InvalidArgument) as caught:
        call.check()
    assert [violation[0] for violation in caught.value.field_violations] == [field]


def test_all_wrong_fields_are_told_at_once():
    """Users mend a request once, not field by field."""
    with pytest.raises(InvalidArgument) as caught:
        replace(GOOD, model="", turns=(), top_p=2).check()
    assert len(caught.value.field_violations) == 3


def test_more_tokens_than_the_model_gives_are_refused():
    """A limit that cannot be kept is an error; none is the default."""
    assert GOOD.limited_to(64) == 64
    assert GOOD.limited_to(4096) == 256
    with pytest.raises(InvalidArgument):
        replace(GOOD, max_tokens=65).limited_to(64)


def test_what_was_delivered_is_kept_as_ids_or_as_text_where_ids_are_missing():
    """An engine resumes from exact ids; text stands in only where the engine hid some."""
    delivered = Delivered()
    delivered.add(Chunk("ab", (1, 2), 2))
    delivered.add(Chunk("😀", (7,), 3))
    assert delivered.pieces == [1, 2, "😀"]
    assert delivered.token_count == 5
