"""Removes addresses, paths and secrets from texts that users read."""

from __future__ import annotations

import ipaddress
import re

ADDRESS = "<address>"
PATH = "<path>"
SECRET = "<secret>"  # noqa: S105  # the placeholder
MAX_TEXT_LENGTH = 2048
# Longer texts are cut before the search, which limits its time.
_MAX_SEARCHED_LENGTH = 4 * MAX_TEXT_LENGTH
_MAX_ROUNDS = 8

# The order matters: a secret may be part of a URL, and a path may look like part of an address.
_SECRETS = (
    (re.compile(r"(?i)\b(bearer|basic)(\s+)[^\s'\",;]+"), rf"\1\2{SECRET}"),
    (
        re.compile(
            r"(?i)(?<![\w-])([\w-]*(?:api[_-]?key|[_-]key|[_-]token|secret|passw(?:or)?d))"
            r"(['\"]?\s*[=:]\s*['\"]?)[^\s'\",;&]+"
        ),
        rf"\1\2{SECRET}",
    ),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)?"), SECRET),
    (re.compile(r"\b(?:sk|pk|rk)-[\w-]{8,}|\b(?:hf|gh[a-z]|xox[a-z])_?-?[\w-]{16,}"), SECRET),
    # Long random strings; digests of artifacts are public.
    (re.compile(r"(?<![\w:-])(?=[\w-]*\d)(?=[\w-]*[A-Za-z])[\w-]{32,}(?![\w-])"), SECRET),
)
_URL = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+|\b(?:ipv[46]|unix|dns):[^\s'\",;<>]+")
_PATH = re.compile(
    r"(?P<quote>['\"])(?:/|[A-Za-z]:\\)(?:(?!(?P=quote)|[\r\n]).)+(?P=quote)"
    r"|(?<![\w.<>/~-])(?:~|[A-Za-z]:(?=\\))?[/\\][\w.@+~%=-]+(?:[/\\][\w.@+~%=-]*)*"
)
_IP = re.compile(
    r"(?<![\w:.])\[?(?:[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:.]+|\d{1,3}(?:\.\d{1,3}){3})\]?(?::\d+)?"
)
_HOST = re.compile(
    r"(?i)(?<![\w.-])(?:(?:[a-z0-9-]+\.)+(?!py:)[a-z0-9-]+:\d{2,5}|[a-z][a-z0-9-]*:\d{4,5}"
    r"|(?:[a-z0-9-]+\.)+(?:com|net|org|edu|gov|dev|cloud|local|localdomain|internal|lan|corp|svc)"
    r"|localhost)(?![\w-])"
)


def public_text(text: str) -> str:
    """Returns an error message for users, redacted and of at most `MAX_TEXT_LENGTH` characters.

    It does not change its own results.
    """
    text = text[:_MAX_SEARCHED_LENGTH].replace("\0", "\ufffd")  # PostgreSQL accepts no NUL
    for _ in range(_MAX_ROUNDS):  # a placeholder or the cut may complete what another pattern finds
        before, text = text, redact(text)[:MAX_TEXT_LENGTH]
        if text == before:
            break
    return text


def redact(text: str) -> str:
    """Returns the text with placeholders for network addresses, file paths and secrets.

    It may remove too much, such as a long name that looks like a secret.
    """
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    text = _URL.sub(ADDRESS, text)
    text = _PATH.sub(PATH, text)
    text = _IP.sub(_without_ip, text)
    return _HOST.sub(ADDRESS, text)


def _without_ip(match: re.Match[str]) -> str:
    """Returns the placeholder for an IP address; other text, such as a time, as it is."""
    found = match.group()
    bare = found
    if found.startswith("["):
        bare = found[1:].partition("]")[0]
    elif found.count(":") == 1:
        bare = found.partition(":")[0]
    try:
        ipaddress.ip_address(bare.rstrip(":."))
    except ValueError:
        return found
    return ADDRESS
