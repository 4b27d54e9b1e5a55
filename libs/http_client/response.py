"""The answer to a request of ours, read as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

# So much may wait unread; then the server is held back.
MAX_UNREAD_BYTES = 256 * 1024

# Nobody here unpacks: requests ask for answers as they are, so that tokens are not held back.
_PACKED = frozenset({"gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd"})


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
        encodings = headers.get("content-encoding", "").lower().replace(" ", "").split(",")
        self._packed = ", ".join(_PACKED.intersection(encodings))

    @property
    def content_type(self) -> str:
        """What the body is, without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def read(self) -> bytes:
        """Returns what has come since the last call, waits if that is nothing; empty: the end.

        Raises:
            HttpError: the answer was cut, or is compressed.
        """
        if self._packed:
            raise HttpError(f"the answer is compressed, though nobody asked for {self._packed}")
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

    # What the connection calls.

    def feed(self, data: bytes) -> None:
        """Takes a part of the body."""
        self._parts.append(data)
        self._unread_bytes += len(data)
        if self._unread_bytes > MAX_UNREAD_BYTES:
            self._hold_back()
        self._wake()

    def end(self, error: HttpError | None) -> None:
        """Notes that nothing more will come; None: all has."""
        self.done = True
        self._error = error
        self._let_come()
        self._wake()

    def _hold_back(self) -> None:
        self._transport.pause_reading()
        # uvloop drops what TLS holds when the connection ends: TLS is to stop at the first byte.
        if hasattr(self._transport, "set_read_buffer_limits"):
            self._transport.set_read_buffer_limits(high=1)

    def _let_come(self) -> None:
        if self._unread_bytes > MAX_UNREAD_BYTES:
            self._transport.resume_reading()
            # Behind what TLS holds: the connection's end must not overtake it.
            asyncio.get_running_loop().call_soon(self._unlimit)
        self._unread_bytes = 0

    def _unlimit(self) -> None:
        reading = self._transport.is_reading() and not self._transport.is_closing()
        if reading and hasattr(self._transport, "set_read_buffer_limits"):
            self._transport.set_read_buffer_limits()

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)
