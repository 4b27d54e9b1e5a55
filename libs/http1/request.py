"""Reads requests from the bytes of a connection.

`httptools`, the parser of Node.js, splits the bytes; this module adds limits and the checks that it
leaves to its user. A request is passed on when all of it has arrived.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import NamedTuple, Protocol

import httptools

# The edge accepts less.
MAX_HEAD_BYTES = 256 * 1024
# How much of a body that is too large is read and dropped, so that its sender gets the response.
MAX_REFUSED_BYTES = 64 * 1024 * 1024

_VERSION = "1.1"
# Header names as they are sent, and in lower case: the edge sends the same ones again and again.
_NAMES: dict[bytes, str] = {}
_MAX_NAMES = 256
_MAX_CACHED_NAME_BYTES = 64
_MAX_NAME_IN_MESSAGE = 64
# The headers of HTTP that hold one value (RFC 9110): a second one contradicts the first.
_SINGLE_HEADERS = frozenset(
    {
        "authorization", "content-length", "content-location", "content-range", "content-type",
        "date", "expect", "from", "host", "if-modified-since", "if-range", "if-unmodified-since",
        "max-forwards", "origin", "proxy-authorization", "range", "referer", "user-agent",
    }
)  # fmt: skip


def _lower(name: bytes) -> str:
    key = name.lower().decode("latin-1")
    if len(_NAMES) < _MAX_NAMES and len(name) <= _MAX_CACHED_NAME_BYTES:
        _NAMES[name] = key
    return key


class BadRequestError(Exception):
    """The bytes are not an HTTP/1.1 request; nothing after them on the connection can be read.

    Attributes:
        status: the response's.
    """

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(message)
        self.status = status


class _UnknownCodingError(ValueError):
    """The body is encoded in a way that this server does not understand."""


class Request(NamedTuple):
    """One request.

    Attributes:
        method: in upper case.
        path: the request target without its query, still percent-encoded.
        headers: names in lower case. The values of a repeated header are joined by commas; a
            header that may not be repeated is left out, see `violation`.
        body: empty if it was too large.
        too_large: the body is longer than the application accepts.
        violation: what is wrong with the head, as a message for the client, or empty. Such
            a request must be refused with status 400.
        keep_alive: the client may use the connection again.
        timed_out: the body arrived too slowly, and only a part of it; `body` is empty. Such a
            request must be refused with status 408.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    too_large: bool
    violation: str
    keep_alive: bool
    timed_out: bool = False


class RequestLimits(Protocol):
    """What an application accepts."""

    def max_body_bytes(self, path: str) -> int:
        """Returns the longest body that requests to a path may have."""

    def is_single_header(self, name: str) -> bool:
        """Returns whether a header, in lower case, may occur only once in a request.

        It is asked about those that HTTP itself does not define as single.
        """


class RequestEvents(Protocol):
    """Who uses a reader."""

    def request_began(self) -> None:
        """Called when the first byte of a request arrives."""

    def continue_expected(self) -> None:
        """Called when a client waits for status 100 before it sends a body."""

    def request_received(self, request: Request) -> None:
        """Called with each complete request."""

    def body_too_long(self) -> None:
        """Called when a body that is too large does not end."""


class RequestReader:
    """Reads the requests of one connection, one after the other.

    Attributes:
        receiving: a part of a request has arrived, and the rest has not.
        in_head: that part is not all of the head.
    """

    def __init__(self, events: RequestEvents, limits: RequestLimits) -> None:
        self._events = events
        self._limits = limits
        self._parser = httptools.HttpRequestParser(self)
        self._method = self._path = self._violation = ""
        self._url = b""
        self._headers: dict[str, str] = {}
        self._repeated: set[str] = set()
        self._keep_alive = True
        self._head_bytes = self._unparsed_bytes = 0
        # A chunk may have a single byte, so that a list of them would need 40 times their size.
        self._body: bytes | bytearray = b""
        self._body_bytes = self._body_limit = 0
        self.in_head = False
        self._ignoring = False  # what follows is not a request
        # The framing header of a body that the parser stopped at, because of an `Upgrade`.
        self._skipped_framing = b""
        self._resuming = False
        self.receiving = False

    def feed(self, data: bytes) -> None:
        """Reads bytes, and calls back for what they contain.

        Raises:
            BadRequestError: they are not HTTP/1.1, or a head is too long.
        """
        if self._ignoring:
            return
        self._unparsed_bytes += len(data)
        rest: bytes | memoryview | None = data
        while rest:
            rest = self._parse(rest)
        if self._unparsed_bytes > MAX_HEAD_BYTES:
            raise BadRequestError("a header is too long")

    def _parse(self, data: bytes | memoryview) -> memoryview | None:
        """Parses bytes; returns those behind a request that asked for another protocol."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._ignoring:
                return None
            self._ignore_upgrade()
            return memoryview(data)[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            cause = error.__context__
            if isinstance(cause, _UnknownCodingError):
                raise BadRequestError(str(cause), HTTPStatus.NOT_IMPLEMENTED) from error
            if isinstance(cause, ValueError | None):
                raise BadRequestError(str(error)) from error
            raise  # a callback failed: our fault
        return None

    def close(self) -> None:
        """Drops what refers back to the reader, which else only a garbage collection would free."""
        del self._parser, self._events

    # Called by the parser. It turns whatever is raised here into an error of its own, and reports
    # a header only when it is complete.

    def on_message_begin(self) -> None:
        """A request starts."""
        if self._resuming:
            return
        self._url = b""
        self._headers = {}
        self._violation = ""
        self.receiving = self.in_head = True
        self._head_bytes = self._body_bytes = 0
        self._events.request_began()

    def on_url(self, url: bytes) -> None:
        """A part of the request target arrived."""
        self._url += url
        self._unparsed_bytes = 0
        self._head_bytes += len(url)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("the head is too long")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header or a trailer arrived."""
        self._unparsed_bytes = 0
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("the head is too long")
        if not self.in_head:  # the edge checks headers and forwards any trailers: ignored
            return
        key, text = _NAMES.get(name) or _lower(name), value.decode("latin-1")
        if key not in self._headers:
            self._headers[key] = text
        elif key in _SINGLE_HEADERS or self._limits.is_single_header(key):
            self._repeated.add(key)
        else:
            self._headers[key] = f"{self._headers[key]}{'; ' if key == 'cookie' else ', '}{text}"

    def on_headers_complete(self) -> None:
        """The head is complete."""
        if self._resuming:
            return
        self.in_head = False
        parser = self._parser
        if parser.get_http_version() != _VERSION:
            raise ValueError("not HTTP/1.1")
        headers = self._headers
        if (
            "transfer-encoding" in headers
            and headers["transfer-encoding"].strip().lower() != "chunked"
        ):
            # RFC 9112, 6.1. The parser would pass such a body on as it is.
            raise _UnknownCodingError("the transfer coding is unknown; use chunked")
        self._method = parser.get_method().decode("latin-1")
        self._path = self._url.partition(b"?")[0].decode("latin-1")
        self._keep_alive = parser.should_keep_alive()
        self._body_limit = self._limits.max_body_bytes(self._path)
        if self._repeated or "host" not in headers:
            self._note_violation()
        if "expect" in headers and headers["expect"].lower() == "100-continue":
            self._events.continue_expected()
        if parser.should_upgrade():
            self._note_upgrade()

    def on_body(self, data: bytes) -> None:
        """A part of the body arrived."""
        self._body_bytes += len(data)
        self._unparsed_bytes = 0
        if self._body_bytes <= self._body_limit:
            if not self._body:
                self._body = data  # nearly always all of it
                return
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += data
            return
        self._body = b""
        if self._body_bytes > MAX_REFUSED_BYTES:
            self._events.body_too_long()

    def on_message_complete(self) -> None:
        """The request is complete, unless the parser stopped before its body."""
        if self._skipped_framing:
            return
        self.receiving = False
        self._events.request_received(self._request())

    def time_out(self) -> Request:
        """Gives up the request whose body is arriving, and returns it; nothing can follow it."""
        self._ignoring = True
        self.receiving = False
        self._body = b""
        return self._request()._replace(timed_out=True, keep_alive=False)

    @property
    def received_bytes(self) -> int:
        """How many bytes the request has so far, about: framing counts only until it is parsed."""
        return self._head_bytes + self._body_bytes + self._unparsed_bytes

    def _request(self) -> Request:
        body, self._body = bytes(self._body), b""
        return Request(
            self._method,
            self._path,
            self._headers,
            body,
            self._body_bytes > self._body_limit,
            self._violation,
            self._keep_alive,
        )

    def _note_violation(self) -> None:
        if self._repeated:
            name = min(self._repeated)[:_MAX_NAME_IN_MESSAGE]
            self._violation = f"the header {name} must not be repeated"
            for key in self._repeated:
                del self._headers[key]
            self._repeated.clear()
        else:
            self._violation = "the header host is missing"

    def _note_upgrade(self) -> None:
        """Records how to continue: the parser takes what follows the head for another protocol."""
        if self._method == "CONNECT":
            self._ignoring = True  # no more requests follow
            self._keep_alive = False
            return
        for name in ("transfer-encoding", "content-length"):
            if name in self._headers:
                self._skipped_framing = f"{name}: {self._headers[name]}".encode("latin-1")

    def _ignore_upgrade(self) -> None:
        """Continues with HTTP/1.1 after the head of a request that asked for another protocol.

        A server may ignore `Upgrade`. The parser cannot: it has to be started again where the body
        starts, behind a head that says how long it is.
        """
        framing, self._skipped_framing = self._skipped_framing, b""
        if not framing:
            return
        self._parser = httptools.HttpRequestParser(self)
        self._resuming = True
        try:
            self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n\r\n" % framing)
        except httptools.HttpParserError as error:
            raise BadRequestError(str(error)) from error
        finally:
            self._resuming = False
