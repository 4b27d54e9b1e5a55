"""A request to an HTTP route, as its handler sees it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from urllib.parse import unquote_to_bytes

from libs.clock import Clock
from libs.errors import DeadlineExceeded, HeadraceError, InvalidArgument
from libs.http1 import Exchange
from libs.rpc import grpc_timeout
from libs.rpc.deadlines import Deadline, Deadlines
from libs.rpc.http_dialect import HTTP_STATUSES, HttpDialect
from libs.rpc.identity import Identity, identity_in
from libs.rpc.served_call import MAX_REQUEST_BYTES, check_arrived

# A client that does not read would never get the end of a response: its connection is closed.
ENDING_SECONDS = 5.0
JSON_TYPE = "application/json"

Handler = Callable[["HttpCall"], Awaitable[None]]


class HttpCall:
    """One request. A handler answers it with `respond`, or with `send_chunk` as often as needed.

    Attributes:
        parameter: the decoded last part of the path, where the route has one; else empty.
        deadline_seconds: when the response must be complete, on the clock's monotonic time.
        start_deadline_seconds: when it must have started: the client's timeout.
    """

    __slots__ = (
        "_clock",
        "_deadline",
        "_deadlines",
        "_dialect",
        "_exchange",
        "_handler",
        "_identity",
        "_longest_seconds",
        "_tail",
        "deadline_seconds",
        "parameter",
        "start_deadline_seconds",
    )

    def __init__(
        self,
        exchange: Exchange,
        handler: Handler,
        *,
        tail: str,
        dialect: HttpDialect,
        longest_seconds: float,
        deadlines: Deadlines,
        clock: Clock,
    ) -> None:
        self.parameter = ""
        self.deadline_seconds = self.start_deadline_seconds = math.inf
        self._exchange = exchange
        self._handler = handler
        self._tail = tail
        self._dialect = dialect
        self._longest_seconds = longest_seconds
        self._deadlines = deadlines
        self._clock = clock
        self._deadline: Deadline | None = None
        self._identity: Identity | None = None

    @property
    def body(self) -> bytes:
        """The request's body."""
        return self._exchange.request.body

    @property
    def headers(self) -> Mapping[str, str]:
        """The request's headers, names in lower case."""
        return self._exchange.request.headers

    @property
    def identity(self) -> Identity:
        """The caller.

        Raises:
            Unauthenticated: the headers name none; the request did not come through the edge.
        """
        if self._identity is None:
            self._identity = identity_in(self.headers)
        return self._identity

    def respond(self, body: bytes, *, content_type: str = JSON_TYPE) -> None:
        """Sends a complete response with status 200.

        Raises:
            ConnectionResetError: the client closed the connection.
        """
        self._exchange.respond(body, content_type=content_type)

    def send_chunk(self, data: bytes, *, content_type: str) -> Awaitable[None]:
        """Sends a part of the response; waits while the client reads too slowly.

        Raises:
            ConnectionResetError: the client closed the connection.
        """
        if self._exchange.status is None:
            self._allow_the_rest()
        return self._exchange.send_chunk(data, content_type=content_type)

    def abort(self) -> None:
        """Closes the connection immediately, so that the response does not look complete."""
        self._exchange.abort()

    def _allow_the_rest(self) -> None:
        """Gives a response that starts the time until the deadline."""
        more_seconds = self.deadline_seconds - self.start_deadline_seconds
        if self._deadline is not None and more_seconds > 0:
            self._deadline.extend(more_seconds)

    # What `serve_call` needs.

    async def work(self) -> None:
        """Calls the handler.

        Raises:
            InvalidArgument: the request breaks a rule of HTTP, or is too large.
            DeadlineExceeded: its body arrived too slowly.
            RuntimeError: the handler sent no response.
        """
        request = self._exchange.request
        check_arrived(request)
        if request.too_large:
            raise InvalidArgument.too_large(
                "body", f"longer than {MAX_REQUEST_BYTES} bytes", limit_bytes=MAX_REQUEST_BYTES
            )
        if self._tail:
            self.parameter = _decoded(self._tail)
        await self._handler(self)
        if self._exchange.status is None:
            raise RuntimeError("the handler sent no response")

    def trace_headers(self) -> Mapping[str, str]:
        """Returns the headers."""
        return self.headers

    def start_deadline(self) -> Deadline | None:
        """Returns the deadline that is first: the caller's or the longest allowed.

        Raises:
            InvalidArgument: the caller's cannot be read.
        """
        headers = self.headers
        seconds = self._longest_seconds
        asked_seconds = grpc_timeout.timeout_seconds(headers)
        if asked_seconds is not None and asked_seconds < seconds:
            seconds = asked_seconds
        now = self._clock.monotonic_seconds()
        self.deadline_seconds = self.start_deadline_seconds = now + seconds
        patience_seconds = self._dialect.client_timeout_seconds(headers)
        if patience_seconds is not None and patience_seconds < seconds:
            seconds = patience_seconds
            self.start_deadline_seconds = now + seconds
        self._deadline = self._deadlines.after(seconds)
        return self._deadline

    def end_of(self, raised: Exception) -> str | None:
        """Returns `CANCELLED` if the client closed the connection."""
        closed = isinstance(raised, ConnectionError) and self._exchange.is_closed
        return "CANCELLED" if closed else None

    async def fail(self, error: HeadraceError, *, expected: bool) -> None:
        """Sends an error response, or ends the one that was started."""
        exchange = self._exchange
        if exchange.status is None:
            headers = {}
            if error.retry_after_seconds is not None:
                headers["retry-after"] = str(math.ceil(error.retry_after_seconds))
            late = exchange.request.timed_out and error.code == DeadlineExceeded.code
            exchange.respond(
                self._dialect.error_body(error),
                content_type=JSON_TYPE,
                status=HTTPStatus.REQUEST_TIMEOUT if late else HTTP_STATUSES[error.code],
                headers=headers,
            )
            return
        chunk = self._dialect.error_chunk(error) if expected else None
        if chunk is None:
            exchange.abort()
            return
        try:
            async with asyncio.timeout(ENDING_SECONDS):
                await exchange.send_chunk(chunk, content_type=JSON_TYPE)
        except (TimeoutError, RuntimeError):  # it does not read, or the response was complete
            exchange.abort()

    async def succeed(self) -> None:
        """Does nothing: the connection ends the response."""


def _decoded(tail: str) -> str:
    """Returns the text of a percent-encoded part of a path.

    Raises:
        InvalidArgument: it is not UTF-8.
    """
    try:
        return unquote_to_bytes(tail).decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument.of_field("path", "must be percent-encoded UTF-8") from error
