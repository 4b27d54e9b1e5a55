"""Triton's log has no messages of models' exceptions, which may quote requests."""

from __future__ import annotations

import io

import pytest

from deploy.triton.log_filter import MAX_LINE_BYTES, copy_log, without_words

HEAD = b'E1127 21:46:36.61 2575 pb_stub.cc:714] "Failed to process the request(s) for model '
# As Triton 2.51 writes it.
FAILURE = (
    HEAD + rb"""'plain_0_0', message: ValueError: quoted SECRET\nsecond SECRET\n\nAt:\n"""
    rb"""  /m/plain/1/model.py(5): execute\n  /m/plain/1/other.py(17): <lambda>\n"
"""
)
KEPT = (
    HEAD + b"'plain_0_0', message: ValueError at /m/plain/1/model.py(5): execute, "
    b'called at /m/plain/1/other.py(17): <lambda>"\n'
)


def copied(log: bytes) -> bytes:
    target = io.BytesIO()
    copy_log(io.BytesIO(log), target)
    return target.getvalue()


def test_the_class_and_the_place_of_an_exception_stay() -> None:
    """Its words do not; the lines around it are copied as they are."""
    around = b'I1127 21:46:36 2575 model_lifecycle.cc:839] "successfully loaded"\n'
    assert copied(around + FAILURE + around) == around + KEPT + around


@pytest.mark.parametrize(
    "words",
    [
        rb"SECRET",
        rb"Error with SECRET: and more",
        rb"ValueError: SECRET\n\nAt:\n  /SECRET(1): x\n\nAt:\n  /m/model.py(5): execute\n",
        rb"ValueError: \"SECRET\", message: SECRET",
        b"ValueError: " + b"SECRET " * 100_000,
    ],
)
def test_no_words_pass(words: bytes) -> None:
    """Whatever they look like, and however long they are."""
    assert b"SECRET" not in copied(HEAD + b"'m_0', message: " + words + b'"\n')


def test_a_long_line_is_copied_whole() -> None:
    """If it is not about an exception."""
    line = b"x" * (3 * MAX_LINE_BYTES) + b"\n"
    assert copied(line + b"next") == line + b"next"
    assert without_words(b"") == b""
