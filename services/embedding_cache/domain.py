"""Vectors of texts, how they are counted, and the rules for requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

from libs.errors import InvalidArgument, Unavailable

RETRY_SECONDS = 1.0
# The owner of the vectors of models whose cache is shared; no tenant has an empty name.
SHARED = ""


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


class Caller(NamedTuple):
    """For whom texts are computed.

    Attributes:
        tenant: who asked, and pays.
        owner: whose vectors they are: the tenant's, or `SHARED`.
    """

    tenant: str
    owner: str


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


def text_keys(artifact_digest: str, owner: str, texts: Sequence[str]) -> list[bytes]:
    """Returns the cache keys of texts: 32 bytes of the artifact, 32 of the owner and the text.

    Args:
        artifact_digest: `sha256:` and 64 hex digits.
        owner: whose vectors they are. No owner can make the key of another's vector.
        texts: what the vectors are of.
    """
    artifact = bytes.fromhex(artifact_digest.removeprefix("sha256:"))
    # Hashed, so that it has a fixed length: owner and text cannot be divided in two ways.
    start = sha256(sha256(owner.encode()).digest())
    keys = []
    for text in texts:
        hashed = start.copy()
        hashed.update(text.encode())
        keys.append(artifact + hashed.digest())
    return keys


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
