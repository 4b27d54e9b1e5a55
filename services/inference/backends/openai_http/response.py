"""A provider's response with status 200: events, or one JSON object, read as chunks."""

from __future__ import annotations

from libs.http_client.response import Response
from services.inference.backends.chat import ChunkSink
from services.inference.backends.openai_http.sse import CompletionStreamParser, read_completion
from services.inference.backends.stall import StallGuard
from services.inference.domain import BackendFailedError, Chunk, Delivered, Finish

MAX_COMPLETION_BYTES = 16 * 1024 * 1024


class ProviderAnswer:
    """Puts what comes into the sink, and reports each token to the guard.

    Attributes:
        has_usage: whether the provider reported the numbers of tokens.
    """

    def __init__(self, *, delivered: Delivered, relay: ChunkSink, guard: StallGuard) -> None:
        self.has_usage = False
        self._delivered = delivered
        self._relay = relay
        self._guard = guard
        self._held: Chunk | None = None

    async def read(self, response: Response) -> Finish:
        """Reads the answer as events or, from a provider that does not stream, as one object.

        Raises:
            BackendFailedError: it is not an answer, or is incomplete.
            HttpError: the connection broke.
        """
        if response.content_type == "text/event-stream":
            finish = await self._read_events(response)
        elif response.content_type == "application/json":
            finish = self._read_completion(await read_body(response, MAX_COMPLETION_BYTES))
        else:
            raise BackendFailedError(f"the provider answers with {response.content_type}")
        # The reported number replaces the number of chunks.
        self._delivered.token_count = finish.completion_tokens
        return finish

    async def _read_events(self, response: Response) -> Finish:
        events = CompletionStreamParser()
        chunks = 0
        while not events.done and (data := await response.read()):
            chunk = events.feed(data)
            if events.chunks != chunks:
                chunks = events.chunks
                self._guard.progress()
            if chunk.token_count:
                self._put(chunk)
            if self._relay.full:
                self._guard.pause()
                await self._relay.room()
                self._guard.progress()
        self.has_usage = events.usage is not None
        finish = events.finish()
        self._put(Chunk("", finish=finish))
        return finish

    def _read_completion(self, body: bytes) -> Finish:
        completion = read_completion(body)
        self.has_usage = completion.usage is not None
        finish = completion.finish
        self._put(Chunk(completion.text, (), finish.completion_tokens, finish))
        return finish

    def _put(self, chunk: Chunk) -> None:
        if self._held is not None:
            chunk, self._held = self._held.followed_by(chunk), None
        if self._delivered.add(chunk):
            self._relay.put(chunk)
        else:  # half of a character: it is delivered with the other half
            self._held = chunk


async def read_body(response: Response, limit: int) -> bytes:
    """Reads a body to its end.

    Raises:
        BackendFailedError: it has more bytes than the limit.
    """
    body = bytearray()
    while data := await response.read():
        body += data
        if len(body) > limit:
            raise BackendFailedError(f"the provider answers with more than {limit} bytes")
    return bytes(body)
