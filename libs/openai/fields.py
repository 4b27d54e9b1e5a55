"""Typed reading of a JSON body; every error names the member by its path."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import NoReturn

import orjson

from libs.errors import InvalidArgument

BODY = "body"
INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
# A body of 4 MiB can have 1.4 million values. To parse and to free those takes half a second in
# which no other request runs, so that they are counted before.
MAX_VALUES = 32_768
# A body without values other than strings has at most as many in this much.
_COUNTED_FROM_BYTES = 2 * MAX_VALUES
MAX_LIST_LENGTH = 4096
_MAX_UNKNOWN_IN_MESSAGE = 8


class Fields:
    """The members of one JSON object, read with the type that each must have.

    `null` reads as a missing member: clients send it for what is not set.
    All readers raise `InvalidArgument` (`INVALID_FIELD`) with a path such as `messages[2].content`.
    """

    __slots__ = ("_path", "_values")

    def __init__(self, values: Mapping[str, object], path: str = "") -> None:
        self._values = values
        self._path = path

    def path(self, key: str) -> str:
        """Returns the path of a member."""
        return f"{self._path}.{key}" if self._path else key

    def refuse(self, key: str, description: str) -> NoReturn:
        """Raises the error of a member."""
        raise InvalidArgument.of_field(self.path(key), description)

    def value(self, key: str) -> object:
        """Returns the value as parsed, or None."""
        return self._values.get(key)

    def text(self, key: str) -> str | None:
        """Returns a string that can be encoded in UTF-8, or None."""
        value = self._values.get(key)
        return None if value is None else check_text(value, path=self.path(key))

    def require_text(self, key: str) -> str:
        """Returns a string that is set and not empty."""
        value = self.text(key)
        if not value:
            self.refuse(key, "must be set")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Returns a list of strings, also if the body has a single string; empty if not set."""
        value = self._values.get(key)
        if value is None:
            return ()
        if isinstance(value, str):
            return (check_text(value, path=self.path(key)),)
        if not isinstance(value, list):
            self.refuse(key, "must be a string or a list of strings")
        path = self.path(key)
        self._check_length(key, value)
        return tuple(check_text(item, path=f"{path}[{i}]") for i, item in enumerate(value))

    def integer(self, key: str, *, limit: int = INT32_MAX) -> int | None:
        """Returns an integer from `-limit` to `limit`, or None."""
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(key, "must be an integer")
        if abs(value) > limit:
            self.refuse(key, f"must be an integer from {-limit} to {limit}")
        return value

    def number(self, key: str) -> float | None:
        """Returns a number, or None."""
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(key, "must be a number")
        try:
            return float(value)
        except OverflowError:
            self.refuse(key, "is too large")

    def boolean(self, key: str) -> bool | None:
        """Returns true, false, or None."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, "must be true or false")
        return value

    def member(self, key: str) -> Fields | None:
        """Returns the members of an object, or None."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(key, "must be an object")
        return Fields(value, self.path(key))

    def members(self, key: str) -> list[Fields]:
        """Returns the objects of a list; empty if not set."""
        value = self._values.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            self.refuse(key, "must be a list of objects")
        path = self.path(key)
        self._check_length(key, value)
        found = []
        for i, item in enumerate(value):
            if not isinstance(item, dict):
                raise InvalidArgument.of_field(f"{path}[{i}]", "must be an object")
            found.append(Fields(item, f"{path}[{i}]"))
        return found

    def refuse_unless(self, checks: Mapping[str, tuple[Callable[[object], bool], str]]) -> None:
        """Raises unless each member that is set passes its check, with the check's description."""
        for key, value in self._values.items():
            if key not in checks or value is None:
                continue
            passes, description = checks[key]
            if not passes(value):
                self.refuse(key, description)

    def refuse_unknown(self, known: Iterable[str]) -> None:
        """Raises if a member is unknown: ignoring it could change the response."""
        unknown = sorted(self._values.keys() - known)
        if unknown:
            named = unknown[:_MAX_UNKNOWN_IN_MESSAGE]
            violations = [(self.path(key), "is not a known field") for key in named]
            raise InvalidArgument.of_fields(violations)

    def _check_length(self, key: str, value: list[object]) -> None:
        if len(value) > MAX_LIST_LENGTH:
            self.refuse(key, f"has {len(value)} entries, more than {MAX_LIST_LENGTH}")


def parse_fields(body: bytes) -> Fields:
    """Reads a body that must be one JSON object.

    Raises:
        InvalidArgument: it is not JSON in UTF-8, not an object, or has too many values.
    """
    if len(body) > _COUNTED_FROM_BYTES and _has_too_many_values(body):
        raise InvalidArgument.of_field(BODY, f"has more than {MAX_VALUES} JSON values")
    try:
        value = orjson.loads(body)
    except ValueError:
        value = _decode_slowly(body)
    if not isinstance(value, dict):
        raise InvalidArgument.of_field(BODY, "must be a JSON object")
    return Fields(value)


def _has_too_many_values(body: bytes) -> bool:
    if sum(map(body.count, (b",", b"[", b"{"))) <= MAX_VALUES:
        return False
    # Some of those are in texts, which are skipped. A value has at most three parts: its key, the
    # sign before it, and itself.
    return next(islice(_PARTS.finditer(body), 3 * MAX_VALUES, None), None) is not None


def _decode_slowly(body: bytes) -> object:
    """Returns what only the standard library accepts, or says what is wrong with the body."""
    try:
        return _decode(body.decode())
    except RecursionError as error:
        raise InvalidArgument.of_field(BODY, "is nested too deeply") from error
    except ValueError as error:  # not UTF-8, not JSON, or an integer of thousands of digits
        raise InvalidArgument.of_field(BODY, f"is not JSON: {error}") from error


def check_text(value: object, *, path: str) -> str:
    """Returns a value that is a string without lone surrogates, which UTF-8 cannot encode.

    Raises:
        InvalidArgument: it is not.
    """
    if not isinstance(value, str):
        raise InvalidArgument.of_field(path, "must be a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument.of_field(path, "has half of a surrogate pair") from error
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is too large")
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    for key, _ in pairs:
        check_text(key, path=BODY)  # keys become parts of paths, and of what is sent on
    return dict(pairs)


# Created once: `json.loads` would create one for each body.
_decode = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_object
).decode
# Strings, also one that does not end, and what precedes each value. Nothing is tried twice
# (possessive quantifiers), so that the time is linear.
_PARTS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{,]', re.DOTALL)
