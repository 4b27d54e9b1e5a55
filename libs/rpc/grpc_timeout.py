"""The header `grpc-timeout`: how long a caller waits. HTTP routes accept it as well."""

from __future__ import annotations

from collections.abc import Mapping

from libs.errors import InvalidArgument

TIMEOUT_KEY = "grpc-timeout"
_MAX_DIGITS = 8
_UNIT_SECONDS = {"H": 3600, "M": 60, "S": 1, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_MAX_LENGTH_IN_MESSAGE = 32


def timeout_seconds(headers: Mapping[str, str]) -> float | None:
    """Returns how long the caller waits; None: it does not say.

    Raises:
        InvalidArgument: the header is malformed.
    """
    text = headers.get(TIMEOUT_KEY)
    if text is None:
        return None
    digits, unit = text[:-1], text[-1:]
    is_number = digits.isascii() and digits.isdecimal() and len(digits) <= _MAX_DIGITS
    if not is_number or unit not in _UNIT_SECONDS:
        raise InvalidArgument.of_field(
            TIMEOUT_KEY,
            f"{text[:_MAX_LENGTH_IN_MESSAGE]!r} is not a timeout: use up to {_MAX_DIGITS} digits "
            f"and one of the units {', '.join(_UNIT_SECONDS)}, such as 30S",
        )
    return int(digits) * _UNIT_SECONDS[unit]
