"""Stop sequences of the chat model."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.model_code import load_module

stops = load_module("smollm2", "stops")
Piece, StopMatcher = stops.Piece, stops.StopMatcher

LETTERS = st.text("ab\n", min_size=1, max_size=4)


def run(pieces: list[str], sequences: list[str], delivered: str = "") -> tuple[list[Any], bool]:
    """Pushes pieces, each with its index as token ID, until a stop or the end."""
    matcher = StopMatcher(sequences, delivered=delivered)
    out = []
    for number, text in enumerate(pieces):
        out.append(matcher.push(Piece(text, (number,))))
        if matcher.stopped:
            return out, True
    out.append(matcher.flush())
    return out, False


def text_of(pieces: list[Any]) -> str:
    return "".join(piece.text for piece in pieces)


def ids_of(pieces: list[Any]) -> list[int]:
    return [token_id for piece in pieces for token_id in piece.token_ids]


def expected(text: str, sequences: list[str]) -> tuple[str, bool]:
    """The answer, character by character: it ends when a sequence is complete."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in sequences if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(pieces=st.lists(LETTERS, max_size=8), sequences=st.lists(LETTERS, max_size=3))
@example(pieces=["abab"], sequences=["bab", "ab"])
@example(pieces=["a", "b\n", "\na"], sequences=["\n\n"])
def test_an_answer_ends_before_the_first_sequence_however_it_is_cut(pieces, sequences):
    """The text is that of the rule, character by character, wherever tokens start and end."""
    out, stopped = run(pieces, sequences)
    whole, ends = expected("".join(pieces), sequences)
    assert stopped == ends
    assert text_of(out) == whole


@given(pieces=st.lists(LETTERS, max_size=8), sequences=st.lists(LETTERS, max_size=3))
def test_no_token_is_lost_or_reported_twice(pieces, sequences):
    """The ids come out in their order; with a stop, up to the token that completed it."""
    out, stopped = run(pieces, sequences)
    ids = ids_of(out)
    assert ids == list(range(len(ids)))
    if not stopped:
        assert len(ids) == len(pieces)


@given(
    pieces=st.lists(LETTERS, min_size=1, max_size=8),
    sequences=st.lists(LETTERS, min_size=1, max_size=3),
    data=st.data(),
)
def test_an_answer_that_is_resumed_is_the_one_that_was_not_cut(pieces, sequences, data):
    """It may be cut wherever something went out; nothing that was sent can start a sequence."""
    out, stopped = run(pieces, sequences)
    cut = data.draw(st.integers(0, len(out) - 1))
    delivered, count = text_of(out[:cut]), len(ids_of(out[:cut]))
    rest, rest_stopped = run(pieces[count:], sequences, delivered=delivered)
    assert delivered + text_of(rest) == text_of(out)
    assert rest_stopped == stopped


def test_only_a_possible_start_of_a_sequence_is_held():
    """A token whose last character may start one waits; then both are sent."""
    matcher = StopMatcher(["\n\n"])
    assert matcher.push(Piece("a", (1,))).text == "a"
    assert matcher.push(Piece("b\n", (2,))) == Piece("", ())
    assert matcher.push(Piece("c", (3,))) == Piece("b\nc", (2, 3))


def test_text_in_front_of_a_sequence_in_the_same_token_goes_out():
    """The token's id goes with it: it was made and is paid for."""
    matcher = StopMatcher(["\n\n"])
    assert matcher.push(Piece("end.\n\nMore", (1,))) == Piece("end.", (1,))
    assert matcher.stopped


def test_a_sequence_whose_beginning_was_delivered_ends_the_answer_at_the_seam():
    """What is out is out; nothing is added to it."""
    matcher = StopMatcher(["STOP"], delivered="please ST")
    assert matcher.push(Piece("OP it", (1,))) == Piece("", (1,))
    assert matcher.stopped


def test_a_completely_delivered_sequence_does_not_end_the_rest():
    """It was not the model's to stop there: another backend with other rules may have sent it."""
    matcher = StopMatcher(["STOP"], delivered="STOP")
    assert matcher.push(Piece(" on", (1,))).text == " on"
    assert not matcher.stopped


@pytest.mark.parametrize("text", ["", "plain"])
def test_without_sequences_all_goes_out_at_once(text):
    """Also tokens without text."""
    assert StopMatcher([]).push(Piece(text, (1,))) == Piece(text, (1,))
