"""What a provider's refusal means: whose fault it is, and what the caller hears."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus

from libs.clock import Clock
from libs.errors import (
    FailedPrecondition,
    HeadraceError,
    InvalidArgument,
    ResourceExhausted,
)
from services.inference.backends.openai_http.sse import ProviderError, told_error
from services.inference.domain import BackendFailedError, ClientError

# A provider that fails is tried so often for one request; others of the version come first.
MAX_ATTEMPTS = 3
DEFAULT_RETRY_SECONDS = 1.0

_CALLERS_FAULT = frozenset(
    {
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.UNPROCESSABLE_ENTITY,
    }
)
_MAY_PASS = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_EARLY})
_CONTEXT_CODES = frozenset({"context_length_exceeded", "exceed_context_size_error"})


def failed(message: str) -> BackendFailedError:
    """Returns the failure of a provider that answers badly or not at all."""
    return BackendFailedError(message, attempts=MAX_ATTEMPTS)


def refusal(
    status: int, headers: Mapping[str, str], body: bytes, clock: Clock
) -> HeadraceError | BackendFailedError:
    """Reads an answer with another status than 200.

    What is not the caller's to mend is not told in the provider's words: those on a wrong key may
    quote it.
    """
    if status in _CALLERS_FAULT:
        return _callers_fault(told_error(body), status)
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return _rate_limited(retry_after_seconds(headers, clock))
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _MAY_PASS:
        error = failed(f"the provider answers {status}")
        error.retry_after_seconds = retry_after_seconds(headers, clock)
        return error
    return misconfigured(f"the provider answers {status}: it rejects the mesh or has no such model")


def misconfigured(message: str) -> BackendFailedError:
    """Returns the failure of a provider that works, but not as it is set up here."""
    told = ClientError(FailedPrecondition, message, "BACKEND_MISCONFIGURED")
    return BackendFailedError(message, attempts=1, client_error=told)


def retry_after_seconds(headers: Mapping[str, str], clock: Clock) -> float:
    """Returns how long the provider asks to be left alone; 0 where it does not."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after", "0")
        if value.strip()[:1].isdigit():
            return float(value)
        at = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return max(0.0, (at - _utc(clock)).total_seconds())


def _utc(clock: Clock) -> datetime:
    return clock.now().astimezone(UTC)


def _callers_fault(told: ProviderError, status: int) -> InvalidArgument:
    message = told.message or f"the provider answers {status}"
    return InvalidArgument(
        message,
        reason="PROMPT_TOO_LONG" if told.code in _CONTEXT_CODES else "INVALID_FIELD",
        field_violations=[(told.param or "messages", message)],
    )


def _rate_limited(seconds: float) -> BackendFailedError:
    return BackendFailedError(
        "the provider answers 429",
        attempts=1,
        retry_after_seconds=seconds,
        client_error=ClientError(
            ResourceExhausted,
            "the provider limits how much it answers",
            "BACKEND_RATE_LIMITED",
            seconds or DEFAULT_RETRY_SECONDS,
        ),
    )
