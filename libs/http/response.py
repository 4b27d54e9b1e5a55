"""The answer to a request of ours, read as it comes."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Mapping

# So much may wait unread; then the server is held back.
MAX_UNREAD_BYTES = 256 * 1024
MAX_UNPACKED_BYTES = 16 * 1024 * 1024

_GZIP_OR_ZLIB = 47  # zlib's window bits: it looks which of both it is


class HttpError(Exception):
    """An answer that did not come, or not whole."""


class Response:
    """An answer.

    Attributes:
        status: of HTTP.
        headers: their names in lower case; of one that came twice, the first.
        until_close: whether only the end of the connection ends it.
        done: whether all of it has come, or nothing more will.
    """

    def __init__(
        self, status: int, headers: Mapping[str, str], transport: asyncio.Transport
    ) -> None:
        self.status = status
        self.headers = headers
        self.until_close = not ("content-length" in headers or "transfer-encoding" in headers)
        self.done = False
        self._transport = transport
        self._parts: list[bytes] = []
        self._unread_bytes = 0
        self._error: HttpError | None = None
        self._arrived: asyncio.Future[None] | None = None
        self._on_done: Callable[[], None] | None = None
        encoding = headers.get("content-encoding", "identity")
        self._unpacking = zlib.decompressobj(_GZIP_OR_ZLIB) if encoding != "identity" else None

    @property
    def content_type(self) -> str:
        """What the body is, without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def read(self) -> bytes:
        """Returns what has come since the last call, waits if that is nothing; empty: the end.

        Raises:
            HttpError: the answer was cut.
        """
        while not self._parts:
            if self.done:
                if self._error is not None:
                    raise self._error
                return b""
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._let_come()
        return data

    def close(self) -> None:
        """Ends the connection, unless all has come: then it is another's."""
        if not self.done:
            self._transport.abort()

    def on_done(self, callback: Callable[[], None]) -> None:
        """Calls back once when nothing more will come."""
        self._on_done = callback

    # What the connection calls.

    def feed(self, data: bytes) -> None:
        """Takes a part of the body.

        Raises:
            HttpError: it is packed in a way that nobody here knows, or too tightly.
        """
        if self._unpacking is not None and not (data := self._unpacked(data)):
            return
        self._parts.append(data)
        self._unread_bytes += len(data)
        if self._unread_bytes > MAX_UNREAD_BYTES:
            self._transport.pause_reading()
        self._wake()

    def end(self, error: HttpError | None) -> None:
        """Notes that nothing more will come; None: all has."""
        self.done = True
        self._error = error
        if error is None and self._unpacking is not None and not self._unpacking.eof:
            self._error = HttpError("the end of what was packed is missing")
        self._let_come()
        self._wake()
        if self._on_done is not None:
            self._on_done()

    def _unpacked(self, data: bytes) -> bytes:
        assert self._unpacking is not None  # noqa: S101  # the caller looked
        try:
            unpacked = self._unpacking.decompress(data, MAX_UNPACKED_BYTES)
        except zlib.error as error:
            encoding = self.headers["content-encoding"]
            raise HttpError(f"an encoding that nobody asked for: {encoding}") from error
        if self._unpacking.unconsumed_tail:
            raise HttpError(f"unpacked, more than {MAX_UNPACKED_BYTES} bytes")
        return unpacked

    def _let_come(self) -> None:
        if self._unread_bytes > MAX_UNREAD_BYTES:
            self._transport.resume_reading()
        self._unread_bytes = 0

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)
