"""Reads the special tokens of a model from its weights, a GGUF file.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_TOKENS, _TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
# Types of tokens that a tokenizer finds in a text as a whole: control and user-defined ones.
_SPECIAL = (3, 4)

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model.

    Attributes:
        size: how many there are; ids are below it.
        special: texts and ids of those that stand for more than their text.
        longest: the length of the longest one in bytes, or more.
    """

    size: int
    special: dict[str, int]
    longest: int


def read_vocabulary(weights: Path) -> Vocabulary:
    """Returns the vocabulary of a model.

    Raises:
        ValueError: the file is no GGUF, or has no tokens.
    """
    with weights.open("rb") as file:
        if file.read(4) != _MAGIC or _scalar(file, "I") not in _VERSIONS:
            raise ValueError(f"{weights.name} is not a GGUF file of a version that can be read")
        _scalar(file, "Q")  # tensors
        found: dict[str, Any] = {}
        for _ in range(_scalar(file, "Q")):
            key = _string(file).decode()
            value = _value(file, _scalar(file, "I"))
            if key in (_TOKENS, _TYPES):
                found[key] = value
            if len(found) == len((_TOKENS, _TYPES)):
                break
    if _TOKENS not in found or len(found.get(_TYPES, ())) != len(found[_TOKENS]):
        raise ValueError(f"{weights.name} has no tokens with types")
    special = {
        token.decode(): token_id
        for token_id, (token, kind) in enumerate(zip(found[_TOKENS], found[_TYPES], strict=True))
        if kind in _SPECIAL
    }
    longest = max(map(len, found[_TOKENS]))  # in the file a byte of the text may be two
    return Vocabulary(len(found[_TOKENS]), special, longest)


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _scalar(file, _SCALARS[kind])
    element, count = _scalar(file, "I"), _scalar(file, "Q")
    if element in _SCALARS:
        code = _SCALARS[element]
        return struct.unpack(f"<{count}{code}", file.read(count * struct.calcsize(code)))
    return [_value(file, element) for _ in range(count)]


def _string(file: BinaryIO) -> bytes:
    return file.read(_scalar(file, "Q"))


def _scalar(file: BinaryIO, code: str) -> Any:
    (value,) = struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))
    return value
