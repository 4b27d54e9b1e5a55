"""Reads the messages of an upload."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from headrace.registry.v1 import registry_pb2

from libs.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted
from libs.shared_limit import SharedLimit
from services.registry.artifacts import CHUNK_BYTES
from services.registry.metrics import UPLOADS_REFUSED, UPLOADS_RUNNING
from services.registry.rules import check_digest

BUSY_RETRY_SECONDS = 1.0
# One tenant has half of the uploads at most, and leaves the next one a place.
ALPHA = 1.0

T = TypeVar("T")


@dataclass(frozen=True)
class UploadLimits:
    """The limits of uploads.

    Attributes:
        size_bytes: of one artifact.
        idle_seconds: between two messages of one upload.
        concurrent: how many uploads may run, of all callers together; a tenant has at most half.
        bytes_per_second: the minimum average rate of an upload. Waiting for the caller uses up a
            budget of `idle_seconds`; each received byte restores 1 / `bytes_per_second` of it.
    """

    size_bytes: int = 8 * 1024**3
    idle_seconds: float = 30.0
    concurrent: int = 4
    bytes_per_second: int = 16 * 1024


class UploadSlots:
    """Limits how many uploads run, of all and of one tenant."""

    def __init__(self, limit: int) -> None:
        self._uploads = SharedLimit(limit, alpha=ALPHA)

    @contextmanager
    def slot(self, tenant: str) -> Iterator[None]:
        """Holds one slot.

        Raises:
            ResourceExhausted: all are in use, or as many as the tenant may have.
        """
        if not self._uploads.take(tenant):
            UPLOADS_REFUSED.inc()
            raise self._refusal(tenant)
        try:
            with UPLOADS_RUNNING.track_inprogress():
                yield
        finally:
            self._uploads.release(tenant)

    def _refusal(self, tenant: str) -> ResourceExhausted:
        limit, text = self._uploads.limit, "uploads are already running"
        if self._uploads.used < limit:
            limit, text = (
                self._uploads.held_by(tenant),
                "uploads of this tenant are already running",
            )
        return ResourceExhausted.of_queue(
            "uploads",
            f"{limit} {text}",
            limit=limit,
            retry_after_seconds=BUSY_RETRY_SECONDS,
        )


class Upload:
    """The messages of one upload."""

    def __init__(
        self, messages: AsyncIterator[registry_pb2.UploadArtifactRequest], *, limits: UploadLimits
    ) -> None:
        self._messages = messages
        self._limits = limits
        # For how long the caller may send nothing.
        self._pause_seconds = limits.idle_seconds

    async def metadata(self) -> registry_pb2.ArtifactMetadata:
        """Reads the first message.

        Raises:
            InvalidArgument: it has no valid metadata.
        """
        first = await self._next()
        if first is None or first.WhichOneof("part") != "metadata":
            raise InvalidArgument.of_field("metadata", "must be the first message")
        check_digest(first.metadata.digest, field="metadata.digest")
        if first.metadata.size_bytes <= 0:
            raise InvalidArgument.of_field("metadata.size_bytes", "must be positive")
        if first.metadata.size_bytes > self._limits.size_bytes:
            raise _too_large("metadata.size_bytes", "the artifact", self._limits.size_bytes)
        return first.metadata

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yields the bytes of the messages after the first.

        Raises:
            InvalidArgument: a message has no chunk, or one that is too large.
            DeadlineExceeded: the caller neither sends nor ends the stream, or sends too slowly.
        """
        while (message := await self._next()) is not None:
            if message.WhichOneof("part") != "chunk":
                raise InvalidArgument.of_field("chunk", "must be set in all messages but the first")
            if len(message.chunk) > CHUNK_BYTES:
                raise _too_large("chunk", "a chunk", CHUNK_BYTES)
            self._earn(len(message.chunk))
            yield message.chunk

    def _earn(self, size_bytes: int) -> None:
        """Adds the pause that a chunk allows; never more than one whole, however fast it came."""
        earned = size_bytes / self._limits.bytes_per_second
        self._pause_seconds = min(self._limits.idle_seconds, self._pause_seconds + earned)

    async def _next(self) -> registry_pb2.UploadArtifactRequest | None:
        reading = asyncio.ensure_future(anext(self._messages, None))
        start = asyncio.get_running_loop().time()
        try:
            await asyncio.wait({reading}, timeout=self._pause_seconds)
        except asyncio.CancelledError:
            reading.cancel()
            raise
        # Only the caller's time counts, not that of the disk.
        self._pause_seconds -= asyncio.get_running_loop().time() - start
        if not reading.done():
            # It ends with the RPC: cancelling a read cancels the RPC, and the caller would not
            # receive this error.
            reading.add_done_callback(_retrieve_exception)
            raise DeadlineExceeded(
                f"no chunk was sent for {self._limits.idle_seconds:g} s, or fewer than "
                f"{self._limits.bytes_per_second} bytes per second",
                reason="DEADLINE_EXCEEDED",
                metadata={"waiting_for": "chunk"},
            )
        return reading.result()


def _retrieve_exception(reading: asyncio.Future[T]) -> None:
    if not reading.cancelled():
        reading.exception()  # otherwise asyncio logs it


def _too_large(field: str, what: str, limit_bytes: int) -> InvalidArgument:
    text = f"{what} has more than {limit_bytes} bytes"
    return InvalidArgument.too_large(field, text, limit_bytes=limit_bytes)
