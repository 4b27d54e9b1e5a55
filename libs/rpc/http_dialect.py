"""How an HTTP API writes errors and reads what its clients say about their patience."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from google.protobuf import json_format
from typing_extensions import override

from libs.errors import HeadraceError
from libs.http1 import CLIENT_CLOSED_REQUEST
from libs.rpc.status import to_status

# HTTP statuses by status code, as the edge's transcoder has them.
HTTP_STATUSES: Mapping[str, int] = {
    "OK": 200,
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": CLIENT_CLOSED_REQUEST,
    "INTERNAL": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


class HttpDialect(Protocol):
    """What the clients of an API expect."""

    def error_body(self, error: HeadraceError) -> bytes:
        """Returns the JSON body of an error response."""

    def error_chunk(self, error: HeadraceError) -> bytes | None:
        """Returns the last chunk of a response that breaks off.

        None: the API has none; the connection is closed instead, so that the response does not look
        complete.
        """

    def client_timeout_seconds(self, headers: Mapping[str, str]) -> float | None:
        """Returns how long the client waits for the start of a response; None: it does not say."""


class StatusDialect(HttpDialect):
    """Errors are a `google.rpc.Status` in JSON."""

    @override
    def error_body(self, error: HeadraceError) -> bytes:
        return json_format.MessageToJson(
            to_status(error), preserving_proto_field_name=True, indent=None
        ).encode()

    @override
    def error_chunk(self, error: HeadraceError) -> bytes | None:
        return None

    @override
    def client_timeout_seconds(self, headers: Mapping[str, str]) -> float | None:
        return None
