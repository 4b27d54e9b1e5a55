"""Random protobuf messages with values that are just allowed, and others that are not."""

from __future__ import annotations

import random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

_TEXTS = (
    "", "a", "smollm2", "models/a", "models/a/versions/1.0.0", "jobs/a", "tenants/acme",
    "deployments/a", "prices/a", "sha256:" + "ab" * 32, "0190f5b2-0000-7000-8000-000000000000",
    "default", 'model = "a"', "YQ==", "\0", "\x7f\n", "é\U0001f600", "../..", "x" * 3000, "*",
)  # fmt: skip
_NUMBERS = (0, 1, 2, 7, -1, 100, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1)
_FLOATS = (0.0, -0.0, 0.5, 1.0, 2.0, -1.0, 1e308, float("inf"), float("-inf"), float("nan"))
_DEPTH = 5


def random_message(source: random.Random, kind: Descriptor, depth: int = 0) -> Message:
    """Returns a message with some of its fields set, often to values that are just allowed."""
    message = GetMessageClass(kind)()
    for field in kind.fields:
        if source.random() < 0.35 or depth > _DEPTH:
            continue
        count = source.choice((0, 1, 1, 2, 5)) if field.is_repeated else 1
        for _ in range(count):
            _set(source, message, field, depth)
    return message


def _set(source: random.Random, message: Any, field: FieldDescriptor, depth: int) -> None:
    is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
    if is_map:
        return
    if field.message_type is not None:
        value: Any = random_message(source, field.message_type, depth + 1)
        if field.is_repeated:
            getattr(message, field.name).append(value)
        else:
            getattr(message, field.name).CopyFrom(value)
        return
    value = _scalar(source, field)
    try:
        if field.is_repeated:
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)
    except ValueError:
        pass  # out of the type's range


def _scalar(source: random.Random, field: FieldDescriptor) -> Any:
    if field.enum_type is not None:
        return source.choice((*field.enum_type.values_by_number, 99))
    return source.choice(
        {
            FieldDescriptor.CPPTYPE_STRING: _TEXTS,
            FieldDescriptor.CPPTYPE_BOOL: (True, False),
            FieldDescriptor.CPPTYPE_DOUBLE: _FLOATS,
            FieldDescriptor.CPPTYPE_FLOAT: _FLOATS,
        }.get(field.cpp_type, _NUMBERS)
        if field.type != FieldDescriptor.TYPE_BYTES
        else (b"", b"a", b"\0" * 100, b"\xff")
    )
