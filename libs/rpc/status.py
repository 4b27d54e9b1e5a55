"""Converts `HeadraceError` to `google.rpc.Status` and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import structlog
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from libs.errors import BY_CODE, DOMAIN, HeadraceError, Internal
from libs.telemetry.tracing import current_trace_id

DETAILS_KEY = "grpc-status-details-bin"
# Together, in base64 and percent-encoded, they stay below gRPC's limit of 8 KiB for trailers.
MAX_ERROR_MESSAGE_BYTES = 384
MAX_TEXT_BYTES = 256
MAX_METADATA_BYTES = 2048
MAX_VIOLATIONS_BYTES = 1024
UNREACHABLE_RETRY_SECONDS = 1.0

_log = structlog.get_logger()


def to_status(error: HeadraceError) -> status_pb2.Status:
    """Returns the status of an error, with `ErrorInfo` and its other details.

    Long texts are cut: with trailers beyond 8 KiB gRPC would send another error instead.
    """
    info = error_details_pb2.ErrorInfo(
        reason=error.reason, domain=DOMAIN, metadata=_cut_metadata(error.metadata)
    )
    details: list[Message] = [info]
    if error.field_violations:
        details.append(_bad_request(error.field_violations))
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after_seconds * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.resource:
        name = cut(error.resource, MAX_TEXT_BYTES)
        details.append(
            error_details_pb2.ResourceInfo(resource_type=name.partition("/")[0], resource_name=name)
        )
    return status_pb2.Status(
        code=code_pb2.Code.Value(error.code),
        message=cut(error.message, MAX_ERROR_MESSAGE_BYTES),
        details=[_packed(detail) for detail in details],
    )


def grpc_code(error: HeadraceError) -> grpc.StatusCode:
    """Returns the `grpc.StatusCode` of an error."""
    return grpc.StatusCode[error.code]


def from_rpc_error(error: grpc.aio.AioRpcError) -> HeadraceError:
    """Returns the error that the callee raised.

    One without our details comes from gRPC itself or from another server: its text, which may
    contain addresses, is logged and not passed on.
    """
    code = error.code().name
    trailers: Iterable[Any] = error.trailing_metadata() or ()
    for key, value in trailers:
        if key == DETAILS_KEY and isinstance(value, bytes):
            found = from_details(BY_CODE.get(code, Internal), error.details() or code, value)
            if found is not None:
                return found
    # gRPC's own text about connections; that of another server may quote the request.
    cause = error.details() if code == "UNAVAILABLE" else None
    _log.warning("call failed without details", code=code, cause=cause)
    if code not in _WITHOUT_DETAILS:
        return Internal(
            "a called service failed without details; see this service's log", reason="INTERNAL"
        )
    reason, message = _WITHOUT_DETAILS[code]
    retry = UNREACHABLE_RETRY_SECONDS if code == "UNAVAILABLE" else None
    return BY_CODE[code](message, reason=reason, retry_after_seconds=retry)


def as_headrace_error(raised: Exception) -> HeadraceError:
    """Returns the error that the caller gets for anything that was raised; the log has the rest."""
    if isinstance(raised, HeadraceError):
        return raised
    if isinstance(raised, grpc.aio.AioRpcError):
        return from_rpc_error(raised)
    _log.error("unexpected error", exc_info=raised)
    return Internal(
        "internal error; the log has the details under this trace id",
        reason="INTERNAL",
        metadata={"trace_id": current_trace_id()},
    )


@contextmanager
def headrace_errors() -> Iterator[None]:
    """Lets RPC errors of calls inside leave as the `HeadraceError` that the callee raised."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


# Errors that gRPC itself reports.
_WITHOUT_DETAILS = {
    "UNAVAILABLE": ("DEPENDENCY_UNAVAILABLE", "a dependency cannot be reached"),
    "DEADLINE_EXCEEDED": ("DEADLINE_EXCEEDED", "the deadline passed before a callee answered"),
    "CANCELLED": ("CANCELLED", "the call was cancelled"),
    "RESOURCE_EXHAUSTED": ("QUEUE_FULL", "a limit of a callee was reached"),
    "UNAUTHENTICATED": ("TOKEN_INVALID", "a callee does not accept the token"),
}


def cut(text: str, limit_bytes: int) -> str:
    """Returns the text, or its start and an ellipsis if it is longer than the limit in UTF-8.

    Halves of surrogate pairs, which UTF-8 cannot encode, become their escapes: an error that quotes
    a request can be sent, whatever the request was.
    """
    data = text[: limit_bytes + 1].encode(errors="backslashreplace")
    if len(data) <= limit_bytes:
        return data.decode()
    return data[: limit_bytes - len("…".encode())].decode(errors="ignore") + "…"


def _cut_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns the metadata with its longest values cut, if it is too large."""
    left = MAX_METADATA_BYTES
    kept = {}
    for key, text in sorted(metadata.items(), key=lambda item: len(item[1])):
        kept[key] = cut(text, max(left, len("…".encode())))
        left -= len(kept[key].encode())
    return kept


def _bad_request(violations: Sequence[tuple[str, str]]) -> error_details_pb2.BadRequest:
    """Returns as many of the first violations as fit, but at least one."""
    detail = error_details_pb2.BadRequest()
    for field, description in violations:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=cut(field, MAX_TEXT_BYTES), description=cut(description, MAX_TEXT_BYTES)
        )
        if detail.ByteSize() + violation.ByteSize() > MAX_VIOLATIONS_BYTES:
            break
        detail.field_violations.append(violation)
    return detail


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def from_details(kind: type[HeadraceError], message: str, value: bytes) -> HeadraceError | None:
    """Returns the error in the details of a callee's status; None: they are not Headrace's."""
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    resource = error_details_pb2.ResourceInfo()
    has_retry = False
    try:
        for detail in status_pb2.Status.FromString(value).details:
            detail.Unpack(info)
            detail.Unpack(bad_request)
            detail.Unpack(resource)
            has_retry = detail.Unpack(retry) or has_retry
    except DecodeError:
        return None
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
