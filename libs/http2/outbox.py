"""Bodies of requests on their way to a peer that says how much it takes (RFC 9113, 5.2)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from libs.http2 import frames
from libs.http2.frames import ErrorCode, FrameType, ProtocolViolationError


class Outgoing:
    """A body of which `left` was not sent yet, and what its stream may still send."""

    __slots__ = ("dropped", "left", "stream_id", "window")

    def __init__(self, stream_id: int, body: bytes, window: int) -> None:
        self.stream_id = stream_id
        self.left = memoryview(body)
        self.window = window
        self.dropped = False

    def drop(self) -> None:
        """Sends nothing more of it, and does not keep it."""
        self.dropped = True
        self.left = memoryview(b"")


class Outbox:
    """Sends bodies as far as the windows of their streams and of the connection reach.

    Attributes:
        max_frame_bytes: what the peer takes in a frame.
    """

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self.max_frame_bytes = frames.MAX_FRAME_BYTES
        self._write = write
        self._window = frames.DEFAULT_WINDOW_BYTES
        self._stream_window = frames.DEFAULT_WINDOW_BYTES
        self._waiting: deque[Outgoing] = deque()

    def send(self, stream_id: int, body: bytes) -> Outgoing:
        """Sends a body, or what there is room for; the rest follows."""
        outgoing = Outgoing(stream_id, body, self._stream_window)
        if self._send(outgoing):
            self._waiting.append(outgoing)
        return outgoing

    def grant(self, outgoing: Outgoing | None, size: int) -> None:
        """Notes that the peer takes so many bytes more; None: of all streams together."""
        if outgoing is None:
            self._window += size
        else:
            outgoing.window += size
        self._send_waiting()

    def set_stream_window(self, size: int) -> None:
        """Notes what new streams may send; those that wait gain or lose the difference.

        Raises:
            ProtocolViolationError: it is larger than a window can be.
        """
        if size > frames.MAX_WINDOW_BYTES:
            raise ProtocolViolationError(ErrorCode.FLOW_CONTROL_ERROR, f"a window of {size}")
        for outgoing in self._waiting:
            outgoing.window += size - self._stream_window
        self._stream_window = size
        self._send_waiting()

    def _send_waiting(self) -> None:
        for _ in range(len(self._waiting)):
            outgoing = self._waiting.popleft()
            if not outgoing.dropped and self._send(outgoing):
                self._waiting.append(outgoing)

    def _send(self, outgoing: Outgoing) -> bool:
        """Sends what the windows allow; returns whether some is left."""
        while True:
            size = min(len(outgoing.left), self.max_frame_bytes, outgoing.window, self._window)
            if outgoing.left and size <= 0:
                return True
            part, outgoing.left = outgoing.left[:size], outgoing.left[size:]
            outgoing.window -= size
            self._window -= size
            flags = 0 if outgoing.left else frames.END_STREAM
            self._write(frames.frame(FrameType.DATA, flags, outgoing.stream_id, bytes(part)))
            if flags:
                return False
