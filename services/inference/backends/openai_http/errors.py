"""What a provider's error means: whose fault it is, and the error for the caller."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import NamedTuple

from libs.clock import Clock
from libs.errors import (
    FailedPrecondition,
    HeadraceError,
    InvalidArgument,
    ResourceExhausted,
)
from services.inference.domain import BackendFailedError, ClientError

# How often one failing provider is tried for one request; other backends come first.
MAX_ATTEMPTS = 3
DEFAULT_RETRY_SECONDS = 1.0
# Longer waits are not passed on to callers; the breaker has a shorter limit of its own.
MAX_RETRY_AFTER_SECONDS = 24 * 3600.0
MAX_TEXT_LENGTH = 500

_CALLERS_FAULT = frozenset(
    {
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.UNPROCESSABLE_ENTITY,
    }
)
_TEMPORARY = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_EARLY})
_CONTEXT_CODES = frozenset({"context_length_exceeded", "exceed_context_size_error"})


class ProviderError(NamedTuple):
    """The fields of an error body; empty where it has none. Cut, since a body may hold anything."""

    message: str = ""
    code: str = ""
    param: str = ""


def read_error(body: bytes, *, key: str = "") -> ProviderError:
    """Reads an error body: OpenAI's shape, or the flatter ones of other providers.

    Args:
        body: JSON, or anything.
        key: the API key that the provider was called with. It is hidden in the decoded texts: JSON
            has many spellings of each character.
    """
    try:
        fields = json.loads(body)
        error = fields.get("error", fields)
        if isinstance(error, str):
            return ProviderError(_text(error, key))
        return ProviderError(*(_text(error.get(field), key) for field in ProviderError._fields))
    except (ValueError, RecursionError, AttributeError):
        return ProviderError()


def _text(value: object, key: str) -> str:
    # Values of other types are not shown: Python's text of them would have the key in other words.
    text = str(value) if isinstance(value, str | int | float) and value else ""
    # First hidden, then cut: the cut could leave most of it.
    return (text.replace(key, "[API key]") if key else text)[:MAX_TEXT_LENGTH]


def failed(message: str) -> BackendFailedError:
    """Returns the failure of a provider that sends an invalid response or none."""
    return BackendFailedError(message, attempts=MAX_ATTEMPTS)


def refusal(
    status: int, headers: Mapping[str, str], body: bytes, clock: Clock, *, key: str = ""
) -> HeadraceError | BackendFailedError:
    """Returns the error of a response whose status is not 200.

    Only errors that the caller can fix are passed on in the provider's words: those about a wrong
    key may quote it. `key` is hidden in those, too.
    """
    if status in _CALLERS_FAULT:
        return _callers_fault(read_error(body, key=key), status)
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return _rate_limited(retry_after_seconds(headers, clock))
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _TEMPORARY:
        error = failed(f"the provider answers {status}")
        error.retry_after_seconds = retry_after_seconds(headers, clock)
        return error
    return misconfigured(
        f"the provider answers {status}: check its URL, its API key and the model's name"
    )


def misconfigured(message: str) -> BackendFailedError:
    """Returns the failure of a provider that works, but not as it is configured here."""
    client_error = ClientError(FailedPrecondition, message, "BACKEND_MISCONFIGURED")
    return BackendFailedError(message, attempts=1, client_error=client_error)


def retry_after_seconds(headers: Mapping[str, str], clock: Clock) -> float:
    """Returns how long the provider asks not to be called; 0 where it does not say."""
    seconds = _requested_seconds(headers, clock)
    return min(max(0.0, seconds), MAX_RETRY_AFTER_SECONDS) if math.isfinite(seconds) else 0.0


def _requested_seconds(headers: Mapping[str, str], clock: Clock) -> float:
    try:
        if "retry-after-ms" in headers:
            return float(headers["retry-after-ms"]) / 1000
        value = headers.get("retry-after", "0")
        if value.strip()[:1].isdigit():
            return float(value)
        at = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return (at - _utc(clock)).total_seconds()


def _utc(clock: Clock) -> datetime:
    return clock.now().astimezone(UTC)


def _callers_fault(error: ProviderError, status: int) -> InvalidArgument:
    # The provider's words may quote the request. They are in the field violation only, since edges
    # write the message of a status to traces.
    message = f"the provider refuses the request with {status}"
    return InvalidArgument(
        message,
        reason="PROMPT_TOO_LONG" if error.code in _CONTEXT_CODES else "INVALID_FIELD",
        field_violations=[(error.param or "messages", error.message or message)],
    )


def _rate_limited(seconds: float) -> BackendFailedError:
    return BackendFailedError(
        "the provider answers 429",
        attempts=1,
        retry_after_seconds=seconds,
        client_error=ClientError(
            ResourceExhausted,
            "the provider's rate limit is reached",
            "BACKEND_RATE_LIMITED",
            seconds or DEFAULT_RETRY_SECONDS,
        ),
    )
