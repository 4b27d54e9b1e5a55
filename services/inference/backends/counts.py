"""Numbers of tokens, as models and providers report them."""

from __future__ import annotations

_MAX_INT32 = 2**31 - 1


def token_count(value: object) -> int | None:
    """Returns a reported number of tokens; None: it is not one that usage records can hold."""
    return value if type(value) is int and 0 <= value <= _MAX_INT32 else None
