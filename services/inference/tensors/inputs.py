"""Checks texts in the tensors of a request before a model sees them.

Names, types and shapes of tensors are checked by Triton's core, which knows the model's
configuration. What it does not know is that the elements of some tensors must be UTF-8: a model
would raise an exception on others, or fail a batch that other requests are in, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from headrace.common.v1 import model_pb2

from libs.embedding_texts import MAX_TEXTS
from libs.errors import InvalidArgument
from services.inference.backends.triton.codec import LENGTH
from services.inference.tensors.codec import fields

# The inputs of Headrace's models that hold texts; see deploy/triton/README.md. Other inputs may
# hold any bytes.
_TEXT_INPUTS = {
    model_pb2.MODEL_KIND_CHAT: "request",
    model_pb2.MODEL_KIND_EMBEDDING: "text",
}

# The parser is Python: it must not block the process.
MAX_INPUTS = 512
_MAX_FIELDS_OF_INPUT = 64

# ModelInferRequest
_INPUTS, _RAW_INPUTS = 5, 7
# InferInputTensor
_NAME, _DATATYPE, _CONTENTS = 1, 2, 5
# InferTensorContents
_BYTES_CONTENTS = 8


class _Input(NamedTuple):
    name: str
    datatype: str
    contents: tuple[tuple[int, int], ...]  # starts and ends; protobuf merges several


def check_encoding(message: bytes, kind: model_pb2.ModelKind.ValueType) -> None:
    """Checks that the texts of a `ModelInferRequest` are UTF-8, and at most `MAX_TEXTS`.

    Raises:
        InvalidArgument: they are not, or the message is malformed. The text has no contents.
    """
    try:
        _check_input(message, _TEXT_INPUTS.get(kind, ""))
    except (ValueError, IndexError) as error:
        raise InvalidArgument(
            f"the message is not a valid ModelInferRequest: {error}", reason="INVALID_FIELD"
        ) from error


def _check_input(message: bytes, name: str) -> None:
    """Checks the texts of one input.

    Raises:
        InvalidArgument: they are not valid texts.
        ValueError, IndexError: the message is malformed.
    """
    inputs, raw = [], []
    for number, start, end in fields(message, 0, len(message)):
        if number == _INPUTS:
            inputs.append(_input(message, start, end))
        elif number == _RAW_INPUTS:
            raw.append((start, end))
        if len(inputs) > MAX_INPUTS:
            raise ValueError(f"it has more than {MAX_INPUTS} inputs")
    named = [index for index, each in enumerate(inputs) if each.name == name]
    if len(named) > 1:
        raise ValueError(f"it has the input {name} more than once")
    for index in named:
        if inputs[index].datatype == "BYTES":
            is_raw = index < len(raw)
            elements = (
                _raw_elements(message, *raw[index], name=name)
                if is_raw
                else _elements(message, inputs[index].contents)
            )
            _check(message, elements, name=name)


def _input(message: bytes, start: int, end: int) -> _Input:
    name = datatype = ""
    contents: list[tuple[int, int]] = []
    for number, first, last in fields(message, start, end, limit=_MAX_FIELDS_OF_INPUT):
        if number == _NAME:
            name = message[first:last].decode()
        elif number == _DATATYPE:
            datatype = message[first:last].decode()
        elif number == _CONTENTS:
            contents.append((first, last))
    return _Input(name, datatype, tuple(contents))


def _check(message: bytes, elements: Iterator[tuple[int, int]], *, name: str) -> None:
    for count, (start, end) in enumerate(elements):
        if count == MAX_TEXTS:
            raise InvalidArgument.of_field(name, f"has more than {MAX_TEXTS} texts")
        try:
            message[start:end].decode()
        except UnicodeDecodeError as error:
            # Without the cause: it has the bytes.
            where = error.start
            raise InvalidArgument.of_field(
                f"{name}[{count}]", f"must be UTF-8; byte {where} is invalid"
            ) from None


def _raw_elements(message: bytes, start: int, end: int, *, name: str) -> Iterator[tuple[int, int]]:
    """Yields where the elements are in raw contents: each follows its length."""
    position = start
    while position < end:
        first = position + LENGTH.size
        if first > end:
            raise InvalidArgument.of_field(name, "ends inside the length of an element")
        (size,) = LENGTH.unpack_from(message, position)
        position = first + size
        if position > end:
            raise InvalidArgument.of_field(name, "ends inside an element")
        yield first, position


def _elements(message: bytes, contents: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for start, end in contents:
        for number, first, last in fields(message, start, end):
            if number == _BYTES_CONTENTS:
                yield first, last
