"""The texts of an embedding request: every service that accepts them applies these rules."""

from __future__ import annotations

from collections.abc import Sequence

from libs.errors import InvalidArgument

MAX_TEXTS = 2048
# All texts of a request fit into one call to `inference`, which accepts 4 MiB.
MAX_TEXTS_BYTES = 4 * 1024 * 1024 - 64 * 1024
# A text may be so many times as long as what a model takes of it, and is cut. What is longer is
# refused before it is tokenized, which takes time and memory for all of it. A token has about four
# bytes, of some languages up to twelve.
MAX_BYTES_PER_TOKEN = 64


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


def check_text_sizes(texts: Sequence[str], *, max_input_tokens: int, field: str) -> None:
    """Checks that each text is not much longer than what a model takes of it.

    Args:
        texts: to embed.
        max_input_tokens: of the model; 0: unknown, all lengths are accepted.
        field: name of the request's field with the texts, for the error.

    Raises:
        InvalidArgument: a text is too long (`MESSAGE_TOO_LARGE`).
    """
    limit_bytes = max_input_tokens * MAX_BYTES_PER_TOKEN
    if not limit_bytes:
        return
    for index, text in enumerate(texts):
        size_bytes = len(text) if text.isascii() else len(text.encode())
        if size_bytes > limit_bytes:
            what = f"has {size_bytes} bytes; the model takes {max_input_tokens} tokens of a text, "
            what += f"and at most {limit_bytes} bytes are accepted: divide it"
            raise InvalidArgument.too_large(f"{field}[{index}]", what, limit_bytes=limit_bytes)
