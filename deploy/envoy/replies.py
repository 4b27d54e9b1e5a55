"""The edge's own error replies, in the form of the services' errors.

gRPC calls get `grpc-status-details-bin`, calls on OpenAI's paths OpenAI's error object, all others
a `google.rpc.Status` in JSON. Messages are fixed: gRPC clients refuse details whose message is not
the call's, and Envoy's own texts name addresses behind the edge; the access log has those.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import MessageToDict

from deploy.envoy.actions import INCOMPLETE
from libs.errors import (
    DeadlineExceeded,
    HeadraceError,
    Internal,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from libs.openai.errors import error_object
from libs.rpc.access import INTERNAL
from libs.rpc.served_call import MAX_REQUEST_BYTES
from libs.rpc.status import DETAILS_KEY, to_status

MAX_JSON_BODY_BYTES = MAX_REQUEST_BYTES
MAX_HEADERS_BYTES = 60 * 1024
RETRY_AFTER_SECONDS = 1.0
OPENAI_PREFIX = "/v1/"

_Filter = dict[str, Any]

# The transcoder gives its requests the headers of gRPC. The header x-envoy-original-method, which
# it adds, shows that the caller itself does not use gRPC.
_GRPC_CALLER: list[_Filter] = [
    {
        "header_filter": {
            "header": {"name": "content-type", "string_match": {"prefix": "application/grpc"}}
        }
    },
    {"header_filter": {"header": {"name": "x-envoy-original-method", "present_match": False}}},
]


_TIMEOUTS = "['max_duration_timeout', 'response_timeout', 'stream_idle_timeout']"
# The circuit breaker of the service's cluster is open.
_FULL: _Filter = {"response_flag_filter": {"flags": ["UO"]}}
_OPENAI_PATH: _Filter = {
    "header_filter": {"header": {"name": ":path", "string_match": {"prefix": OPENAI_PREFIX}}}
}
_UNCHANGED_BODY = {"text_format_source": {"inline_string": "%LOCAL_REPLY_BODY%"}}


@dataclass(frozen=True)
class _Reply:
    """One error that the edge returns.

    Attributes:
        when: the access log filter that matches the case.
        error: what the caller gets.
        http_status: the status for callers that do not use gRPC; 0: the one Envoy has chosen.
        has_envoy_text: whether JSON callers get Envoy's message, which says what is wrong with
            their request, in place of the fixed one.
    """

    when: _Filter
    error: HeadraceError
    http_status: int = 0
    has_envoy_text: bool = False


def local_replies() -> list[dict[str, Any]]:
    """Returns the mappers of Envoy's local replies, three for each. The first match applies."""
    mappers = []
    for reply in _replies():
        status = to_status(reply.error)
        mappers.append(
            {
                "filter": {"and_filter": {"filters": [*_GRPC_CALLER, reply.when]}},
                # Everything is in the headers, so gRPC-Web need not translate trailers.
                "status_code": 200,
                "body": {"inline_string": ""},
                "body_format_override": {**_UNCHANGED_BODY, "content_type": "application/grpc"},
                "headers_to_add": [
                    _header("grpc-status", str(status.code)),
                    _header("grpc-message", status.message),
                    _header(DETAILS_KEY, base64.b64encode(status.SerializeToString()).decode()),
                ],
            }
        )
        openai_body = error_object(reply.error, http_status=reply.http_status or None)
        status_body = MessageToDict(status, preserving_proto_field_name=True)
        mappers.append(
            {
                "filter": {"and_filter": {"filters": [_OPENAI_PATH, reply.when]}},
                **_json_reply(reply, openai_body, openai_body["error"]),
            }
        )
        mappers.append({"filter": reply.when, **_json_reply(reply, status_body, status_body)})
    return mappers


def _replies() -> Iterator[_Reply]:
    yield _Reply(
        _code_details(".contains('Jwt_is_missing')"),
        Unauthenticated("the call carries no token", reason="TOKEN_INVALID"),
    )
    yield _Reply(
        _code_details(".contains('Jwt_is_expired')"),
        Unauthenticated("the token has expired", reason="TOKEN_INVALID"),
    )
    yield _Reply(  # before the next: the other 403 is the JWT filter's
        _code_details(" == 'direct_response' && response.code == 403"),
        PermissionDenied(
            "only services of the mesh may call this",
            reason="SCOPE_MISSING",
            metadata={"scope": INTERNAL},
        ),
        http_status=403,
    )
    yield _Reply(
        _statuses(401, 403),
        Unauthenticated("the token is not valid", reason="TOKEN_INVALID"),
        http_status=401,
    )
    yield _Reply(
        _statuses(404, 405),
        Unimplemented("no service has this method", reason="METHOD_NOT_FOUND"),
        http_status=404,
    )
    yield _Reply(
        _code_details(f" in {_TIMEOUTS} && xds.route_name == '{INCOMPLETE}'"),
        DeadlineExceeded(
            "the body of the request did not arrive in time; send it faster",
            reason="DEADLINE_EXCEEDED",
            metadata={"waiting_for": "the body of the request"},
        ),
        http_status=408,
    )
    yield _Reply(
        _statuses(429, 429),
        ResourceExhausted(
            "too many requests in a short time; retry later",
            reason="RATE_LIMITED",
            retry_after_seconds=RETRY_AFTER_SECONDS,
        ),
    )
    yield _Reply(_statuses(413, 413), _too_large("body", MAX_JSON_BODY_BYTES))
    yield _Reply(
        _statuses(415, 415),
        Unimplemented(
            "compressed messages are not accepted; send them without compression",
            reason="INVALID_FIELD",
        ),
        http_status=415,
    )
    yield _Reply(_statuses(431, 431), _too_large("headers", MAX_HEADERS_BYTES))
    yield _Reply(
        _code_details(f" in {_TIMEOUTS}"),
        DeadlineExceeded(
            "the deadline passed",
            reason="DEADLINE_EXCEEDED",
            metadata={"waiting_for": "the answer of the service"},
        ),
        http_status=504,
    )
    yield _Reply(
        _statuses(400, 499),
        InvalidArgument("the request cannot be read", reason="INVALID_FIELD"),
        has_envoy_text=True,
    )
    yield _Reply(
        _statuses(501, 501),
        Unimplemented("the transfer coding is unknown; use chunked", reason="INVALID_FIELD"),
        http_status=501,
    )
    yield _Reply(
        _statuses(500, 500), Internal("the edge failed", reason="INTERNAL"), http_status=500
    )
    for condition, cause, message in (
        (_FULL, "overflow", "the service is at its limit of requests; retry later"),
        (_code_details(" == 'overload'"), "overload", "the edge is overloaded"),
    ):
        yield _Reply(
            condition,
            Unavailable(
                message,
                reason="EDGE_UNAVAILABLE",
                metadata={"cause": cause},
                retry_after_seconds=RETRY_AFTER_SECONDS,
            ),
            http_status=503,
        )
    yield _Reply(
        _statuses(502, 599),
        Unavailable(
            "the edge cannot reach the service",
            reason="EDGE_UNAVAILABLE",
            retry_after_seconds=RETRY_AFTER_SECONDS,
        ),
        http_status=503,
    )


def _too_large(what: str, limit_bytes: int) -> HeadraceError:
    return InvalidArgument.too_large(
        what, f"longer than {limit_bytes} bytes", limit_bytes=limit_bytes
    )


def _json_reply(reply: _Reply, body: dict[str, Any], message_of: dict[str, Any]) -> dict[str, Any]:
    """Returns what a mapper does; `message_of` is the part of the body that has the message."""
    mapper: dict[str, Any] = {}
    if reply.http_status:
        mapper["status_code"] = reply.http_status
    if reply.has_envoy_text:
        # `json_format` escapes the value. The fixed messages need no escaping.
        message_of["message"] = "%LOCAL_REPLY_BODY%"
        mapper["body_format_override"] = {"json_format": body}
    else:
        mapper["body"] = {"inline_string": json.dumps(body)}
        mapper["body_format_override"] = {**_UNCHANGED_BODY, "content_type": "application/json"}
    if reply.error.retry_after_seconds is not None:
        mapper["headers_to_add"] = [_header("retry-after", f"{reply.error.retry_after_seconds:g}")]
    return mapper


def _header(key: str, value: str) -> dict[str, Any]:
    return {
        "header": {"key": key, "value": value},
        "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
    }


def _statuses(lowest: int, highest: int) -> _Filter:
    def compare(op: str, value: int) -> _Filter:
        default = {"default_value": value, "runtime_key": "headrace.edge.unset"}
        return {"status_code_filter": {"comparison": {"op": op, "value": default}}}

    if lowest == highest:
        return compare("EQ", lowest)
    return {"and_filter": {"filters": [compare("GE", lowest), compare("LE", highest)]}}


def _code_details(condition: str) -> _Filter:
    """Returns the filter for a CEL condition on Envoy's response code details."""
    return {
        "extension_filter": {
            "name": "envoy.access_loggers.extension_filters.cel",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.access_loggers.filters.cel.v3"
                ".ExpressionFilter",
                "expression": f"response.code_details{condition}",
            },
        }
    }
