"""The texts of an embedding request: every service that accepts them applies these rules."""

from __future__ import annotations

from collections.abc import Sequence

from libs.errors import InvalidArgument

MAX_TEXTS = 2048
# All texts of a request fit into one call to `inference`, which accepts 4 MiB.
MAX_TEXTS_BYTES = 4 * 1024 * 1024 - 64 * 1024


def check_texts(texts: Sequence[str], *, field: str) -> None:
    """Checks the texts of a request.

    Raises:
        InvalidArgument: there are none, too many, an empty one, or too many bytes in all.
    """
    if not texts:
        raise InvalidArgument.of_field(field, "must have at least one text")
    if len(texts) > MAX_TEXTS:
        raise InvalidArgument.of_field(
            field, f"has {len(texts)} texts, more than the limit of {MAX_TEXTS}"
        )
    empty = [index for index, text in enumerate(texts) if not text]
    if empty:
        # One is enough to say what is wrong; the details travel in a trailer of limited size.
        raise InvalidArgument.of_field(f"{field}[{empty[0]}]", "must not be empty")
    size_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
    if size_bytes > MAX_TEXTS_BYTES:
        what = f"has {size_bytes} bytes, more than the limit of {MAX_TEXTS_BYTES}"
        raise InvalidArgument.too_large(field, what, limit_bytes=MAX_TEXTS_BYTES)
