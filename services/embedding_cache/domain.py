"""Vectors of texts, how they are counted, and the rules for requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from libs.errors import InvalidArgument, Unavailable

RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Vector:
    """The vector of one text, in the form in which it is cached.

    Attributes:
        encoded: a serialised `headrace.common.v1.Embedding` (float32, little-endian, and the token
            count). A hit is copied into the response without decoding it.
        token_count: tokens of the text.
    """

    encoded: bytes
    token_count: int


@dataclass(frozen=True)
class Lookup:
    """The vectors for one request.

    Attributes:
        vectors: one for each text, in their order.
        computed: indices of the texts that were computed for this request; the rest are hits.
    """

    vectors: Sequence[Vector]
    computed: frozenset[int]

    @property
    def hit_count(self) -> int:
        """Number of texts that were not computed for this request."""
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
    """Returns the cache key of a text: the digests of artifact and text, 32 bytes each."""
    return bytes.fromhex(artifact_digest.removeprefix("sha256:")) + sha256(text.encode()).digest()


def check_dimensions(wanted: int | None, actual: int) -> None:
    """Checks the length of vectors that a request asks for, if it does.

    Raises:
        InvalidArgument: the model's vectors have another length. Vectors are never shortened.
    """
    if wanted is not None and wanted != actual:
        raise InvalidArgument.of_field("dimensions", f"must be {actual} for this model, or not set")


def backend_failed(message: str) -> Unavailable:
    """Returns the error for a computation that failed or returned invalid vectors."""
    return Unavailable(message, reason="BACKEND_FAILED", retry_after_seconds=RETRY_SECONDS)
