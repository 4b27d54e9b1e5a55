"""A response, read as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

# So much may be buffered unread; then reading from the server pauses.
MAX_UNREAD_BYTES = 256 * 1024

# Not decompressed here: requests ask for plain responses, so that tokens are not held back.
_COMPRESSED = frozenset({"gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd"})


class HttpError(Exception):
    """A response that did not arrive, or only in part."""


class Response:
    """A response.

    Attributes:
        status: the status code.
        headers: by name in lower case; of a repeated one, the first value.
        until_close: whether only the end of the connection ends the body.
        done: whether all data has arrived, or no more will.
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
        encodings = headers.get("content-encoding", "").lower().replace(" ", "").split(",")
        self._compression = ", ".join(_COMPRESSED.intersection(encodings))

    @property
    def content_type(self) -> str:
        """The media type of the body, without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def read(self) -> bytes:
        """Returns the data since the last call, waiting for some; empty at the end.

        Raises:
            HttpError: the response was cut off, or is compressed.
        """
        if self._compression:
            raise HttpError(f"the response is compressed ({self._compression}): not requested")
        while not self._parts:
            if self.done:
                if self._error is not None:
                    raise self._error
                return b""
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._resume_reading()
        return data

    def close(self) -> None:
        """Closes the connection, unless all data has arrived: then it serves other requests."""
        if not self.done:
            self._transport.abort()

    # Called by the connection.

    def feed(self, data: bytes) -> None:
        """Adds a part of the body."""
        self._parts.append(data)
        self._unread_bytes += len(data)
        if self._unread_bytes > MAX_UNREAD_BYTES:
            self._pause_reading()
        self._wake()

    def end(self, error: HttpError | None) -> None:
        """Marks the end of the data; without an error, the response is complete."""
        self.done = True
        self._error = error
        self._resume_reading()
        self._wake()

    def _pause_reading(self) -> None:
        self._transport.pause_reading()
        # uvloop drops TLS's buffer when the connection ends, so TLS must stop at the first byte.
        if hasattr(self._transport, "set_read_buffer_limits"):
            self._transport.set_read_buffer_limits(high=1)

    def _resume_reading(self) -> None:
        if self._unread_bytes > MAX_UNREAD_BYTES:
            self._transport.resume_reading()
            # After the data in TLS's buffer: the connection's end must not overtake it.
            asyncio.get_running_loop().call_soon(self._reset_buffer_limits)
        self._unread_bytes = 0

    def _reset_buffer_limits(self) -> None:
        reading = self._transport.is_reading() and not self._transport.is_closing()
        if reading and hasattr(self._transport, "set_read_buffer_limits"):
            self._transport.set_read_buffer_limits()

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)
