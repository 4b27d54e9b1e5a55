"""Resource names of one collection, as in AIP-122; those of model versions are elsewhere."""

from __future__ import annotations

from libs.errors import InvalidArgument
from libs.model_reference import IDENTIFIER


def resource_name(collection: str, identifier: str) -> str:
    """Returns `collection/identifier`."""
    return f"{collection}/{identifier}"


def parse_name(name: str, collection: str, *, field: str = "name") -> str:
    """Returns the identifier of `collection/identifier`.

    Raises:
        InvalidArgument: the name has another form.
    """
    head, slash, identifier = name.partition("/")
    if head != collection or not slash or not IDENTIFIER.fullmatch(identifier):
        raise InvalidArgument.of_field(
            field,
            f"must be {collection}/ID with an ID of a-z, 0-9 and -, which starts with a letter "
            "and has at most 63 characters",
        )
    return identifier
