"""What happens around every call that a server answers, whatever carries it.

`serve_call` is used for gRPC over HTTP/2 (`interceptors`), gRPC over HTTP/1.1 (`grpc_http1`) and
plain HTTP (`http_call`): it makes the span, keeps the deadline, turns whatever is raised into an
error with a status code, and records the end. A `Carrier` knows only how its protocol writes that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Protocol, TypeVar

from google.protobuf.message import DecodeError
from opentelemetry import trace

from libs.clock import Clock
from libs.errors import DeadlineExceeded, HeadraceError, InvalidArgument, forget_frames
from libs.http1 import Request
from libs.rpc.access import OPEN
from libs.rpc.call_observer import CallObserver
from libs.rpc.deadlines import Deadline
from libs.rpc.field_count import has_more_fields
from libs.rpc.identity import Identity
from libs.rpc.status import as_headrace_error
from libs.telemetry.tracing import server_span

# The longest request. gRPC itself lets more pass, so that the error can carry `ErrorInfo`.
MAX_REQUEST_BYTES = 4 * 1024 * 1024
# The fields of a request, those of the messages in it included. A conversation of 1,024 messages
# with four parts each has 14,000.
MAX_FIELDS = 32_768
# The longest request of a method that needs no token: those carry a name, or nothing.
MAX_OPEN_REQUEST_BYTES = 4 * 1024

_tracer = trace.get_tracer("headrace.rpc")

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class Carrier(Protocol[T_co]):
    """One call, as the protocol that carries it presents it."""

    @property
    def identity(self) -> Identity:
        """The caller.

        Raises:
            Unauthenticated: the call names none.
        """

    async def work(self) -> T_co:
        """Does what the call asks for."""

    def trace_headers(self) -> Mapping[str, str]:
        """Returns headers, with `traceparent` among them if the caller has a trace."""

    def start_deadline(self) -> Deadline | None:
        """Returns the deadline of the work; None: it has none. Called once.

        Raises:
            InvalidArgument: the caller's deadline cannot be read.
        """

    def end_of(self, raised: Exception) -> str | None:
        """Returns the status code of a call that is over, so that no error can be sent any more.

        None: it is not over, and the error is sent.
        """

    async def fail(self, error: HeadraceError, *, expected: bool) -> None:
        """Sends an error; not expected: a bug, after which what was sent must not look complete."""

    async def succeed(self) -> None:
        """Ends the response."""


async def serve_call(
    carrier: Carrier[T], observer: CallObserver, clock: Clock, *, scope: str
) -> T | None:
    """Does the work of a call and returns its result, or sends the error and returns None.

    Args:
        carrier: the call.
        observer: records its start and its end.
        clock: the time.
        scope: what the caller must have; `OPEN`: nothing, not even an identity.
    """
    name = observer.span_name
    with server_span(_tracer, name, carrier.trace_headers()) if name else nullcontext():
        started_seconds = clock.monotonic_seconds()
        observer.started()
        code = "CANCELLED"
        try:
            try:
                if scope != OPEN:
                    carrier.identity.require(scope)
                deadline = carrier.start_deadline()
                if deadline is None:
                    result = await carrier.work()
                else:
                    with deadline:
                        result = await carrier.work()
            except Exception as raised:
                end = carrier.end_of(raised)
                if end is not None:
                    code = end
                    raise
                error = as_headrace_error(raised)
                code = error.code
                forget_frames(raised)
                await carrier.fail(error, expected=error is raised)
                return None
            code = "OK"
            await carrier.succeed()
            return result
        finally:
            observer.ended(code, clock.monotonic_seconds() - started_seconds)


def read_message(
    parse: Callable[[bytes], T], message: bytes, *, limit_bytes: int = MAX_REQUEST_BYTES
) -> T:
    """Returns a message of a request, parsed.

    Whatever carries the call, parsing is a part of its work, so that a message that cannot be read
    is refused with `ErrorInfo`; a deserializer of gRPC could only end the call with `UNKNOWN`. Size
    and number of fields are checked first: parsed, a message may take 25 times its size.

    Args:
        parse: such as `FromString` of the request's type.
        message: the serialised message, not compressed.
        limit_bytes: how long it may be.

    Raises:
        InvalidArgument: it is too large, has too many fields, or is not a message of the request's
            type.
    """
    if len(message) > limit_bytes:
        raise too_large(f"the message has {len(message)} bytes,", limit_bytes)
    if len(message) > 2 * MAX_FIELDS:  # one has at least two bytes
        kind = getattr(parse, "__self__", None)  # of `FromString`: the class of the message
        if kind is not None and has_more_fields(message, kind.DESCRIPTOR, limit=MAX_FIELDS):
            raise InvalidArgument(
                f"the message has more than {MAX_FIELDS} fields", reason="INVALID_FIELD"
            )
    try:
        return parse(message)
    except DecodeError as error:
        raise InvalidArgument(
            "the message cannot be parsed as a request of this method", reason="INVALID_FIELD"
        ) from error


def check_arrived(request: Request) -> None:
    """Checks that a request over HTTP/1.1 is valid HTTP and arrived in time.

    Raises:
        InvalidArgument: it breaks a rule.
        DeadlineExceeded: its body arrived too slowly.
    """
    if request.violation:
        raise InvalidArgument(request.violation, reason="INVALID_FIELD")
    if request.timed_out:
        raise DeadlineExceeded(
            "the body was still incomplete after the time limit; send it faster",
            reason="DEADLINE_EXCEEDED",
            metadata={"waiting_for": "the body"},
        )


def too_large(what: str, limit_bytes: int = MAX_REQUEST_BYTES) -> InvalidArgument:
    """Returns the error of a message that is too large."""
    return InvalidArgument.too_large(
        "", f"{what} more than {limit_bytes} bytes", limit_bytes=limit_bytes
    )
