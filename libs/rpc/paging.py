"""Pages of lists, as in AIP-158: opaque tokens that hold the last key of a page."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from libs.errors import InvalidArgument

T = TypeVar("T")

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000


@dataclass(frozen=True)
class PageRequest:
    """Which page to return: `size` rows after the key `after`."""

    size: int
    after: str

    @classmethod
    def parse(cls, page_size: int, page_token: str) -> PageRequest:
        """Reads the two fields of a request.

        Raises:
            InvalidArgument: the size is negative, or the token is invalid.
        """
        if page_size < 0:
            raise InvalidArgument.of_field("page_size", "must not be negative")
        try:
            after = base64.b64decode(page_token.encode(), altchars=b"-_", validate=True).decode()
        except (binascii.Error, ValueError) as error:
            raise invalid_page_token() from error
        if "\0" in after:  # in no key, and PostgreSQL accepts none
            raise invalid_page_token()
        return cls(min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE), after)

    @property
    def limit(self) -> int:
        """Number of rows to read: one more than the page has, to see whether there are more."""
        return self.size + 1


def invalid_page_token() -> InvalidArgument:
    """Makes the error of a page token that no response had."""
    return InvalidArgument.of_field(
        "page_token", "invalid page token; use next_page_token of the page before, or none"
    )


@dataclass(frozen=True)
class Page(Generic[T]):
    """Some rows and the token of the next page, empty at the end."""

    rows: Sequence[T]
    next_page_token: str

    @classmethod
    def of(cls, rows: Sequence[T], request: PageRequest, *, key: Callable[[T], str]) -> Page[T]:
        """Cuts the rows that were read with `request.limit` to a page."""
        if len(rows) <= request.size:
            return cls(rows, "")
        page = rows[: request.size]
        return cls(page, base64.urlsafe_b64encode(key(page[-1]).encode()).decode())
