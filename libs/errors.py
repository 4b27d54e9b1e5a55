"""The errors that cross RPCs.

HeadraceError
├── InvalidArgument        INVALID_ARGUMENT
├── Unauthenticated        UNAUTHENTICATED
├── PermissionDenied       PERMISSION_DENIED
├── NotFound               NOT_FOUND
├── AlreadyExists          ALREADY_EXISTS
├── FailedPrecondition     FAILED_PRECONDITION
├── Aborted                ABORTED
├── ResourceExhausted      RESOURCE_EXHAUSTED
├── Unavailable            UNAVAILABLE         the only one that clients may always retry
├── DeadlineExceeded       DEADLINE_EXCEEDED
├── Cancelled              CANCELLED
├── Unimplemented          UNIMPLEMENTED
└── Internal               INTERNAL

`libs.rpc.status` turns them into `google.rpc.Status` and back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

DOMAIN = "headrace"


# Of an error, so many causes are followed.
MAX_CAUSES = 32


class HeadraceError(Exception):
    """An error with a status code, a reason for programs and a message for people.

    Attributes:
        reason: a `headrace.common.v1.ErrorReason` without its prefix.
        metadata: details for programs; the reason's comment in the proto names the keys.
        retry_after_seconds: when to try again, or None.
        field_violations: pairs of a field and what is wrong with it.
        resource: the full name of the resource that the error is about, or empty.
    """

    code: ClassVar[str]

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        metadata: Mapping[str, str] | None = None,
        retry_after_seconds: float | None = None,
        field_violations: Sequence[tuple[str, str]] = (),
        resource: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after_seconds = retry_after_seconds
        self.field_violations = tuple(field_violations)
        self.resource = resource


class InvalidArgument(HeadraceError):
    """The request is invalid; a retry does not help."""

    code = "INVALID_ARGUMENT"

    @classmethod
    def of_field(cls, field: str, description: str) -> Self:
        """Makes the error of one invalid field."""
        return cls.of_fields([(field, description)])

    @classmethod
    def of_fields(cls, violations: Sequence[tuple[str, str]]) -> Self:
        """Makes the error of several invalid fields."""
        text = "; ".join(f"{field}: {description}" for field, description in violations)
        return cls(text, reason="INVALID_FIELD", field_violations=violations)

    @classmethod
    def too_large(cls, field: str, description: str, *, limit_bytes: int) -> Self:
        """Makes the error of a field that has too many bytes; an empty name means the message."""
        return cls(
            f"{field}: {description}" if field else description,
            reason="MESSAGE_TOO_LARGE",
            metadata={"limit_bytes": str(limit_bytes)},
            field_violations=[(field, description)],
        )


class Unauthenticated(HeadraceError):
    """The caller did not prove who it is."""

    code = "UNAUTHENTICATED"


class PermissionDenied(HeadraceError):
    """The caller may not do this."""

    code = "PERMISSION_DENIED"


class NotFound(HeadraceError):
    """The resource does not exist."""

    code = "NOT_FOUND"

    @classmethod
    def of_resource(cls, name: str) -> Self:
        """Makes the error of a missing resource."""
        return cls(
            f"{name} does not exist",
            reason="RESOURCE_NOT_FOUND",
            metadata={"resource": name},
            resource=name,
        )


class AlreadyExists(HeadraceError):
    """The resource exists already, with other content."""

    code = "ALREADY_EXISTS"

    @classmethod
    def of_resource(cls, name: str) -> Self:
        """Makes the error of an existing resource."""
        return cls(
            f"{name} exists already",
            reason="RESOURCE_EXISTS",
            metadata={"resource": name},
            resource=name,
        )


class FailedPrecondition(HeadraceError):
    """The system is not in the state that the call needs."""

    code = "FAILED_PRECONDITION"


class Aborted(HeadraceError):
    """A concurrent change; read the resource again and retry."""

    code = "ABORTED"


class ResourceExhausted(HeadraceError):
    """A limit is reached: a quota, a budget, a queue."""

    code = "RESOURCE_EXHAUSTED"

    @classmethod
    def of_queue(cls, queue: str, message: str, *, limit: int, retry_after_seconds: float) -> Self:
        """Makes the error of a queue that is full, or of which the tenant has its share."""
        return cls(
            message,
            reason="QUEUE_FULL",
            metadata={"queue": queue, "limit": str(limit)},
            retry_after_seconds=retry_after_seconds,
        )


class Unavailable(HeadraceError):
    """The call cannot be served now; a retry may succeed."""

    code = "UNAVAILABLE"


class DeadlineExceeded(HeadraceError):
    """The deadline passed before the work was done."""

    code = "DEADLINE_EXCEEDED"


class Cancelled(HeadraceError):
    """The caller cancelled the call."""

    code = "CANCELLED"


class Unimplemented(HeadraceError):
    """The method does not exist."""

    code = "UNIMPLEMENTED"


class Internal(HeadraceError):
    """A bug in the mesh. The log has the details."""

    code = "INTERNAL"


BY_CODE: Mapping[str, type[HeadraceError]] = {
    kind.code: kind for kind in HeadraceError.__subclasses__()
}


def forget_frames(error: BaseException) -> None:
    """Drops the frames that an error came through, once it was logged.

    They have the request. gRPC, and the frame that handles it, keep an error in reference cycles
    until the garbage collector runs: large requests would fill the memory until then.
    """
    found: BaseException | None = error
    for _ in range(MAX_CAUSES):
        if found is None:
            return
        found.__traceback__ = None
        found = found.__cause__ or found.__context__
