"""The form of a token's claims, for who signs tokens, for the edge, and for the services.

The edge copies claims into headers, and names go into resource names, ledgers and logs: each claim
is one string of few characters. All three check them, so that a claim of another form passes
nowhere, even if it is signed with the right key.
"""

from __future__ import annotations

import re

# Regular expressions that mean the same to Python's `re` and to the edge's RE2; they match all of
# a claim. A name cannot be `-`, which stands for all tenants in requests.
NAME = "[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}"
SCOPES = "([a-z]{1,32}( [a-z]{1,32}){0,15})?"

NAME_RULE = "must be 1 to 128 characters of A-Z a-z 0-9 . _ @ + - and start with a letter or digit"

_NAME = re.compile(NAME, re.ASCII)
_SCOPES = re.compile(SCOPES, re.ASCII)
_PRIORITY = re.compile("[0-9]", re.ASCII)


def is_name(value: object) -> bool:
    """Returns whether a value can be a tenant or a user."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def are_scopes(value: object) -> bool:
    """Returns whether a value can be the scopes of a token: words separated by single spaces."""
    return isinstance(value, str) and _SCOPES.fullmatch(value) is not None


def is_priority(value: object) -> bool:
    """Returns whether a header's value can be a priority."""
    return isinstance(value, str) and _PRIORITY.fullmatch(value) is not None
