"""Filters of lists, as `protos/README.md` defines them: `field = "value" AND other = "value"`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from libs.errors import InvalidArgument

_CONDITION = re.compile(r'\s*([A-Za-z_][A-Za-z0-9_.]*)\s*=\s*"((?:[^"\\]|\\["\\])*)"')
_AND = re.compile(r"\s+AND(?=\s)")
_ESCAPE = re.compile(r"\\(.)")


def parse_filter(text: str, *, fields: Collection[str]) -> Mapping[str, str]:
    """Returns the value that each field must have; fields without a condition are absent.

    Args:
        text: the field `filter` of the request; empty: no conditions.
        fields: the names that the filter may use.

    Raises:
        InvalidArgument: `INVALID_FIELD` on `filter`.
    """
    conditions: dict[str, str] = {}
    end = len(text.rstrip())
    position = 0
    while position < end:
        if conditions:
            joint = _AND.match(text, position)
            if joint is None:
                raise filter_error(f"expected AND at character {position + 1}")
            position = joint.end()
        condition = _CONDITION.match(text, position)
        if condition is None:
            raise filter_error(f'expected FIELD = "VALUE" at character {position + 1}')
        _add(conditions, condition, fields)
        position = condition.end()
    return conditions


def filter_error(description: str) -> InvalidArgument:
    """Makes the error of a wrong filter, also for values that only the caller can check."""
    return InvalidArgument.of_field("filter", description)


def _add(conditions: dict[str, str], condition: re.Match[str], fields: Collection[str]) -> None:
    field, quoted = condition.groups()
    if field not in fields:
        raise filter_error(f"unknown field {field[:64]}; use one of {', '.join(sorted(fields))}")
    if field in conditions:
        raise filter_error(f"{field} has two conditions")
    if "\0" in quoted:  # PostgreSQL accepts none
        raise filter_error(f"the value of {field} has a NUL character")
    conditions[field] = _ESCAPE.sub(r"\1", quoted)
