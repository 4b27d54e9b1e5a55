"""What generation and backends agree on: who generates an answer, and where its chunks go."""

from __future__ import annotations

from typing import Protocol

from services.inference.domain import ChatCall, Chunk, Delivered, Finish


class ChunkSink(Protocol):
    """Takes the chunks of an answer from a backend."""

    @property
    def full(self) -> bool:
        """Whether to await `room` before the next chunk."""

    def put(self, chunk: Chunk) -> None:
        """Adds a chunk."""

    async def room(self) -> None:
        """Returns when another chunk may be added."""


class ChatBackend(Protocol):
    """Generates answers."""

    async def generate(
        self,
        backend_model: str,
        call: ChatCall,
        *,
        max_tokens: int,
        delivered: Delivered,
        relay: ChunkSink,
    ) -> Finish:
        """Generates an answer, or the rest of one, into a sink and returns how it ended.

        Args:
            backend_model: the backend's name of the model.
            call: the request.
            max_tokens: of the whole answer.
            delivered: what the answer has already; each chunk is added to it before it is put
                into the sink.
            relay: takes the chunks.

        Raises:
            BackendFailedError: the backend failed; another one may continue the answer.
            DeadlineExceeded: the caller's deadline passed.
            HeadraceError: the backend refuses the request.
        """

    async def close(self) -> None:
        """Closes all connections."""
