"""HTTP bodies as gRPC carries them to the edge, and what all of OpenAI's objects share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import orjson
from google.api import httpbody_pb2

from libs.errors import HeadraceError

CHAT_COMPLETIONS_PATH = "/v1/chat/completions"
JSON_TYPE = "application/json"
EVENT_STREAM_TYPE = "text/event-stream"

Json = Mapping[str, object]

# The edge has the same table by HTTP status, for errors that come as a status.
_ERROR_TYPES = {
    "INVALID_ARGUMENT": "invalid_request_error",
    "FAILED_PRECONDITION": "invalid_request_error",
    "ALREADY_EXISTS": "invalid_request_error",
    "ABORTED": "invalid_request_error",
    "UNAUTHENTICATED": "authentication_error",
    "PERMISSION_DENIED": "permission_error",
    "NOT_FOUND": "not_found_error",
    "RESOURCE_EXHAUSTED": "rate_limit_error",
}

# JSON in UTF-8, without spaces.
to_json = orjson.dumps


@dataclass(frozen=True)
class Served:
    """What Headrace says beyond OpenAI's fields, as the member `headrace` of an answer.

    Clients that do not know it skip it.
    """

    model_version: str
    artifact_digest: str
    deployment: str
    route_reason: str
    cost_nano_usd: int
    request_id: str
    trace_id: str

    def to_json_object(self) -> Json:
        """Returns the member's value."""
        return vars(self)

    @property
    def fingerprint(self) -> str:
        """The answer's `system_fingerprint`: equal as long as the same artifact answers."""
        return f"fp_{self.artifact_digest.removeprefix('sha256:')[:12]}"


def json_body(value: Json) -> httpbody_pb2.HttpBody:
    """Returns an object as the body of an answer."""
    return httpbody(to_json(value), JSON_TYPE)


def httpbody(data: bytes, content_type: str) -> httpbody_pb2.HttpBody:
    """Returns bytes as a body, or as one part of it."""
    return httpbody_pb2.HttpBody(content_type=content_type, data=data)


def error_object(error: HeadraceError) -> Json:
    """Returns OpenAI's form of an error; `code` is our reason in lower case."""
    field = error.field_violations[0][0] if error.field_violations else ""
    return {
        "error": {
            "message": error.message,
            "type": _ERROR_TYPES.get(error.code, "api_error"),
            "param": field or None,
            "code": error.reason.lower(),
        }
    }


def model_object(model: str, *, created_seconds: int = 0, owner: str = "headrace") -> Json:
    """Returns a `model`; `created_seconds` is Unix time."""
    return {"id": model, "object": "model", "created": created_seconds, "owned_by": owner}


def list_object(items: Iterable[Json]) -> dict[str, object]:
    """Returns a `list` of OpenAI's objects."""
    return {"object": "list", "data": list(items)}
