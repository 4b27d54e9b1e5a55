"""Reads the texts in the tensors of requests to Headrace's own models."""

from __future__ import annotations

import json
from collections.abc import Iterator

from libs.chat.request import GenerationRequest, Message
from libs.errors import InvalidArgument
from services.inference.backends.triton.codec import LENGTH
from services.inference.tensors.codec import MAX_FIELDS, fields

# ModelInferRequest
_INPUTS, _RAW_INPUTS = 5, 7
# InferInputTensor, and the contents of one
_CONTENTS, _BYTES_CONTENTS = 5, 8


def check_text_sizes(message: bytes, limit_bytes: int) -> None:
    """Checks that no text is so long that it cannot fit, before it is tokenized.

    Raises:
        InvalidArgument: one is (`MESSAGE_TOO_LARGE`).
    """
    if not limit_bytes:
        return
    longest = longest_element_bytes(message, enough=limit_bytes)
    if longest > limit_bytes:
        text = f"a text has {longest} bytes, more than this model can take: {limit_bytes}"
        raise InvalidArgument.too_large("inputs", text, limit_bytes=limit_bytes)


def conversation_of(message: bytes, *, model: str) -> GenerationRequest | None:
    """Returns the conversation of a request to a chat model; None: it cannot be read."""
    try:
        messages = json.loads(_first_element(message))["messages"]
        read = tuple(Message(str(each["role"]), str(each["content"])) for each in messages)
    except (ValueError, IndexError, KeyError, TypeError, RecursionError):
        return None
    return GenerationRequest(model=model, messages=read)


def longest_element_bytes(message: bytes, *, enough: int) -> int:
    """Returns the size of the longest element of all tensors of bytes in a `ModelInferRequest`.

    Tensors of other types are read as if they were of bytes.

    Args:
        message: a message that `read_request` has read.
        enough: an element that is longer ends the search.

    Raises:
        InvalidArgument: a tensor is malformed, or has more elements than a model takes.
    """
    if len(message) <= enough:  # no element can be longer
        return 0
    try:
        longest = 0
        for start, end in _elements(message, enough):
            longest = max(longest, end - start)
            if longest > enough:
                break
    except (ValueError, IndexError) as error:
        raise InvalidArgument(
            f"the message is not a valid ModelInferRequest: {error}", reason="INVALID_FIELD"
        ) from error
    return longest


def _first_element(message: bytes) -> bytes:
    """Returns the first element of the first tensor of bytes in a `ModelInferRequest`, or nothing.

    Raises:
        ValueError, IndexError: a tensor is malformed.
    """
    first = next(_elements(message, 0), None)
    return message[first[0] : first[1]] if first is not None else b""


def _elements(message: bytes, shortest_input: int) -> Iterator[tuple[int, int]]:
    """Yields start and end of elements; inputs that are not longer are skipped."""
    for number, start, end in fields(message, 0, len(message)):
        if number == _RAW_INPUTS:
            position, count = start, 0
            while position + LENGTH.size <= end:
                count += 1
                if count > MAX_FIELDS:
                    raise ValueError(f"a tensor has more than {MAX_FIELDS} texts")
                (size,) = LENGTH.unpack_from(message, position)
                position += LENGTH.size + size
                yield position - size, position
        elif number == _INPUTS and end - start > shortest_input:
            for inner, first, last in fields(message, start, end):
                if inner == _CONTENTS:
                    texts = fields(message, first, last)
                    yield from ((at, to) for kind, at, to in texts if kind == _BYTES_CONTENTS)
