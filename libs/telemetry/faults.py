"""What logs and traces say of an error: its kind and where it was raised, never what was processed.

The message of an exception may quote what it was raised for: `invalid literal for int(): '…'`, a
validation error with its input, an SQL error with the values of the row, the text of a model. So
messages are left out, except of errors whose text is known to be the mesh's own.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Final

from libs.errors import HeadraceError

# Errors of the caller may quote the request, or a model that quotes it.
_CALLERS_FAULTS: Final = frozenset(
    {"INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "ABORTED"}
)
# Packages whose errors name streams, tables and states, and no values.
_PLAIN_PACKAGES: Final = ("nats", "sqlite3")
MAX_TEXT_CHARACTERS: Final = 512
MAX_CHAINED_ERRORS: Final = 8


def describe(error: BaseException) -> str:
    """Returns the kind of an error, with its message where that cannot quote a request.

    A class of errors whose messages never quote data has the class attribute
    `has_plain_message = True`.
    """
    name = type(error).__name__
    if isinstance(error, HeadraceError):
        text = f"{name} {error.reason}"
        if error.code not in _CALLERS_FAULTS:
            text = f"{text}: {error.message}"
    elif getattr(error, "has_plain_message", False) or _package(error) in _PLAIN_PACKAGES:
        text = f"{name}: {error}"
    elif isinstance(error, OSError):
        text = f"{name}: {error.strerror}" if error.strerror else name
    elif isinstance(original := getattr(error, "orig", None), BaseException):  # SQLAlchemy's
        text = f"{name}: {describe(original)}"
    elif state := getattr(error, "sqlstate", None):  # PostgreSQL's
        text = f"{name}: SQLSTATE {state}"
    else:
        text = name
    return text[:MAX_TEXT_CHARACTERS]


def error_type(error: BaseException) -> str:
    """Returns the value of the attribute `error.type`: the reason, or the name of the class."""
    return error.reason if isinstance(error, HeadraceError) else type(error).__name__


def traceback_of(error: BaseException) -> str:
    """Returns the traceback, with files, lines and code, and `describe` in place of messages."""
    return "\n".join(_blocks(error))


def _blocks(error: BaseException) -> Iterator[str]:
    chain: list[tuple[BaseException, str]] = [(error, "")]
    while len(chain) < MAX_CHAINED_ERRORS:
        last = chain[-1][0]
        if last.__cause__ is not None:
            chain.append((last.__cause__, "caused"))
        elif last.__context__ is not None and not last.__suppress_context__:
            chain.append((last.__context__, "was handled before"))
        else:
            break
    for each, relation in reversed(chain):
        frames = traceback.format_list(traceback.extract_tb(each.__traceback__))
        head = "Traceback (most recent call last):\n" if frames else ""
        yield f"{head}{''.join(frames)}{describe(each)}"
        if relation:
            yield f"which {relation}:"
        if isinstance(each, BaseExceptionGroup):
            yield "of " + ", ".join(describe(part) for part in each.exceptions)


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]
