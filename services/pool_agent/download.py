"""Fetches artifacts from the registry and verifies them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterable, Callable
from pathlib import Path

from headrace.registry.v1.registry_internal_pb2 import DownloadArtifactResponse
from prometheus_client import Counter

from services.pool_agent.archive import ArtifactRefused

STALL_SECONDS = 30.0
_BYTES = Counter("headrace_pool_agent_fetched_bytes", "Bytes of artifacts fetched.")

OpenDownload = Callable[[str], AsyncIterable[DownloadArtifactResponse]]


class Downloads:
    """Fetches a limited number of artifacts concurrently."""

    def __init__(
        self, open_stream: OpenDownload, *, limit_bytes: int, concurrency: int = 2
    ) -> None:
        self._open_stream = open_stream
        self._limit_bytes = limit_bytes
        self._slots = asyncio.Semaphore(concurrency)

    async def fetch(self, digest: str, path: Path) -> None:
        """Writes the artifact to a file; returns only if the bytes have the digest.

        Raises:
            ArtifactRefused: the bytes have another digest, or are too many.
            TimeoutError: no bytes arrived for 30 s.
            grpc.aio.AioRpcError: the registry refused, or the stream broke.
        """
        async with self._slots:
            actual = await self._write(digest, path)
        if actual != digest:
            await asyncio.to_thread(path.unlink, missing_ok=True)
            raise ArtifactRefused(f"has the digest {actual} instead of {digest}")

    async def _write(self, digest: str, path: Path) -> str:
        hasher = hashlib.sha256()
        size_bytes = 0
        messages = aiter(self._open_stream(digest))
        with path.open("wb") as stream:
            while True:
                async with asyncio.timeout(STALL_SECONDS):
                    message = await anext(messages, None)
                if message is None:
                    return f"sha256:{hasher.hexdigest()}"
                size_bytes += len(message.chunk)
                if size_bytes > self._limit_bytes:
                    raise ArtifactRefused(f"has more than {self._limit_bytes} bytes")
                _BYTES.inc(len(message.chunk))
                hasher.update(message.chunk)
                await asyncio.to_thread(stream.write, message.chunk)
