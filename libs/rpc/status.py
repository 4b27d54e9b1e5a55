"""`HeadraceError` to `google.rpc.Status` and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from headrace.common.v1 import error_reason_pb2

from libs.errors import BY_CODE, DOMAIN, HeadraceError, Internal

DETAILS_KEY = "grpc-status-details-bin"
_PREFIX = "ERROR_REASON_"


def to_status(error: HeadraceError) -> status_pb2.Status:
    """Returns the status of an error, with `ErrorInfo` and what else the error knows."""
    error_reason_pb2.ErrorReason.Value(_PREFIX + error.reason)  # only reasons the proto knows
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    ]
    if error.field_violations:
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field=field, description=text)
                    for field, text in error.field_violations
                ]
            )
        )
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after_seconds * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.resource:
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type=error.resource.partition("/")[0], resource_name=error.resource
            )
        )
    return status_pb2.Status(
        code=code_pb2.Code.Value(error.code),
        message=error.message,
        details=[_packed(detail) for detail in details],
    )


def grpc_code(error: HeadraceError) -> grpc.StatusCode:
    """Returns grpc's own code of an error."""
    return grpc.StatusCode[error.code]


def from_rpc_error(error: grpc.aio.AioRpcError) -> HeadraceError:
    """Returns the error that the callee raised; one without details gets a reason of ours."""
    kind = BY_CODE.get(error.code().name, Internal)
    message = error.details() or error.code().name
    trailers: Iterable[Any] = error.trailing_metadata() or ()
    for key, value in trailers:
        if key == DETAILS_KEY and isinstance(value, bytes):
            found = _from_details(kind, message, value)
            if found is not None:
                return found
    return kind(message, reason=_REASON_WITHOUT_DETAILS.get(error.code().name, "INTERNAL"))


@contextmanager
def headrace_errors() -> Iterator[None]:
    """Lets RPC errors of calls inside leave as the `HeadraceError` that the callee raised."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


_REASON_WITHOUT_DETAILS = {
    "UNAVAILABLE": "DEPENDENCY_UNAVAILABLE",
    "DEADLINE_EXCEEDED": "DEADLINE_EXCEEDED",
    "CANCELLED": "CANCELLED",
    "RESOURCE_EXHAUSTED": "QUEUE_FULL",
    "UNAUTHENTICATED": "TOKEN_INVALID",
}


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _from_details(kind: type[HeadraceError], message: str, value: bytes) -> HeadraceError | None:
    try:
        status = status_pb2.Status.FromString(value)
    except DecodeError:
        return None
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    resource = error_details_pb2.ResourceInfo()
    has_retry = False
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad_request)
        detail.Unpack(resource)
        has_retry = detail.Unpack(retry) or has_retry
    if info.domain != DOMAIN:
        return None
    return kind(
        message,
        reason=info.reason,
        metadata=info.metadata,
        retry_after_seconds=retry.retry_delay.ToMilliseconds() / 1000 if has_retry else None,
        field_violations=[(v.field, v.description) for v in bad_request.field_violations],
        resource=resource.resource_name,
    )
