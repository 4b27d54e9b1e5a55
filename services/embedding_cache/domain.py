"""Texts, their vectors, and the rules of what may be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from libs.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Vector:
    """One text's vector, in the form in which it is kept.

    Attributes:
        encoded: a serialised `headrace.common.v1.Embedding`: float32, little-endian, and the
            token count. Four bytes a number, and a hit is copied into its answer unread.
        token_count: tokens of the text.
    """

    encoded: bytes
    token_count: int


@dataclass(frozen=True)
class Lookup:
    """How the texts of one request were answered.

    Attributes:
        vectors: one a text, in their order.
        computed: indices of the texts that were computed for this request; the rest are hits.
    """

    vectors: Sequence[Vector]
    computed: frozenset[int]

    @property
    def hit_count(self) -> int:
        """How many texts were not computed for this request."""
        return len(self.vectors) - len(self.computed)

    @property
    def token_count(self) -> int:
        """Tokens of all texts."""
        return sum(vector.token_count for vector in self.vectors)

    @property
    def cached_token_count(self) -> int:
        """Tokens of the hits."""
        return sum(
            vector.token_count
            for index, vector in enumerate(self.vectors)
            if index not in self.computed
        )


def text_key(artifact_digest: str, text: str) -> bytes:
    """Returns the key of a text's vector: 32 bytes of the artifact's digest, 32 of the text's."""
    return bytes.fromhex(artifact_digest.removeprefix("sha256:")) + sha256(text.encode()).digest()


def check_dimensions(wanted: int | None, actual: int) -> None:
    """Returns if the vectors have the length that was asked for, or none was.

    Raises:
        InvalidArgument: they have another; vectors are not cut.
    """
    if wanted is not None and wanted != actual:
        raise InvalidArgument.of_field("dimensions", f"must be {actual} for this model, or not set")
