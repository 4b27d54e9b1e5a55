"""What logs say of errors: kind and place, and messages only where they cannot quote a request."""

from __future__ import annotations

import sqlite3

import pytest
import sqlalchemy
from nats.js.errors import NotFoundError

from libs.errors import InvalidArgument, Unavailable
from libs.telemetry.faults import MAX_TEXT_CHARACTERS, describe, error_type, traceback_of

SECRET = "my secret"  # noqa: S105  # what a message quotes


class PlainError(Exception):
    has_plain_message = True


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError(SECRET), "ValueError"),
        (KeyError(SECRET), "KeyError"),
        (ExceptionGroup(SECRET, [ValueError(SECRET)]), "ExceptionGroup"),
        (OSError(SECRET), "OSError"),
        (FileNotFoundError(2, "No such file", SECRET), "FileNotFoundError: No such file"),
        (PlainError("the queue is full"), "PlainError: the queue is full"),
        (Unavailable("away", reason="BACKEND_FAILED"), "Unavailable BACKEND_FAILED: away"),
        (InvalidArgument(SECRET, reason="INVALID_FIELD"), "InvalidArgument INVALID_FIELD"),
        (sqlite3.OperationalError("database is locked"), "OperationalError: database is locked"),
        (PlainError("x" * 10_000), f"PlainError: {'x' * 10_000}"[:MAX_TEXT_CHARACTERS]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_error_is_described_without_what_it_quotes(error: Exception, text: str) -> None:
    """Of unknown errors only the kind is known to be safe."""
    assert describe(error) == text


def test_errors_of_libraries_keep_what_helps() -> None:
    """A database's own words and a bus's codes, without values of rows."""
    original = sqlite3.IntegrityError("UNIQUE constraint failed: jobs.job_id")
    error = sqlalchemy.exc.IntegrityError("INSERT …", {"payload": SECRET}, original)
    assert SECRET in str(error)
    assert describe(error) == (
        "IntegrityError: IntegrityError: UNIQUE constraint failed: jobs.job_id"
    )
    missing = NotFoundError(code=404, err_code=10059, description="stream not found")
    assert "stream not found" in describe(missing)


def test_the_type_of_an_error_is_its_reason() -> None:
    """As in the metrics."""
    assert error_type(Unavailable("away", reason="BACKEND_FAILED")) == "BACKEND_FAILED"
    assert error_type(ValueError(SECRET)) == "ValueError"


def test_a_traceback_shows_the_code_and_the_chain() -> None:
    """The innermost error first, as Python writes it."""

    def fail(value: str) -> None:
        try:
            int(value)
        except ValueError:
            raise RuntimeError(value)  # noqa: B904  # the context is the point

    with pytest.raises(RuntimeError) as caught:
        fail(SECRET)
    text = traceback_of(caught.value)
    assert SECRET not in text
    assert "int(value)" in text
    assert text.index("ValueError\nwhich was handled before:") < text.index("raise RuntimeError")
    assert text.endswith("\nRuntimeError")
