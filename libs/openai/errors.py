"""OpenAI's form of errors, for services and for the edge's own replies on OpenAI's paths."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

from typing_extensions import override

from libs.errors import HeadraceError
from libs.openai.bodies import to_json
from libs.rpc.http_dialect import HTTP_STATUSES, HttpDialect
from libs.rpc.status import MAX_ERROR_MESSAGE_BYTES, MAX_TEXT_BYTES, cut

ErrorObject = dict[str, dict[str, str | None]]

# By HTTP status.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
# What unmodified clients send: how long they wait for the next bytes, in seconds. The Python client
# uses the first name, those for Node.js and others the second.
_CLIENT_TIMEOUTS: Final = ("x-stainless-read-timeout", "x-stainless-timeout")


def error_object(
    error: HeadraceError, *, http_status: int | None = None
) -> dict[str, dict[str, str | None]]:
    """Returns an error; its `code` is our reason in lower case.

    Args:
        error: what happened. What is too long is cut.
        http_status: of the response. None: the one that belongs to the error's code.
    """
    field, violation = error.field_violations[0] if error.field_violations else ("", "")
    message = error.message if violation in error.message else f"{error.message}: {violation}"
    return {
        "error": {
            "message": cut(message, MAX_ERROR_MESSAGE_BYTES),
            "type": _type(http_status or HTTP_STATUSES[error.code]),
            "param": cut(field, MAX_TEXT_BYTES) or None,
            "code": error.reason.lower(),
        }
    }


def error_event(error: HeadraceError) -> bytes:
    """Returns the event that ends a broken stream; no `[DONE]` follows it.

    Without it, a stream that breaks off looks complete to an HTTP/1.1 client.
    """
    return b"data: %b\n\n" % to_json(error_object(error))


class OpenAIDialect(HttpDialect):
    """What OpenAI's clients expect of an HTTP API."""

    @override
    def error_body(self, error: HeadraceError) -> bytes:
        return to_json(error_object(error))

    @override
    def error_chunk(self, error: HeadraceError) -> bytes | None:
        return error_event(error)

    @override
    def client_timeout_seconds(self, headers: Mapping[str, str]) -> float | None:
        for name in _CLIENT_TIMEOUTS:
            if name in headers:
                return _positive(headers[name])
        return None


def _type(http_status: int) -> str:
    is_server_error = http_status >= HTTPStatus.INTERNAL_SERVER_ERROR
    return _TYPES.get(http_status, "api_error" if is_server_error else "invalid_request_error")


def _positive(text: str) -> float | None:
    """Returns a number above 0. Anything else is a library's matter: it says nothing to us."""
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if seconds > 0 else None
