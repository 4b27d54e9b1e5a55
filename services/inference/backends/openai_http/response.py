"""A provider's answer with status 200: events or one JSON object in, pieces out."""

from __future__ import annotations

from libs.http_client.response import Response
from services.inference.backends.chat import ChunkSink
from services.inference.backends.openai_http.sse import CompletionStreamParser, whole_answer
from services.inference.backends.stall import StallGuard
from services.inference.domain import BackendFailedError, Chunk, Delivered, Finish

MAX_WHOLE_BYTES = 16 * 1024 * 1024


class ProviderAnswer:
    """Puts what comes into the relay, and tells the guard of each token.

    Attributes:
        has_usage: whether the provider told how many tokens there were.
    """

    def __init__(self, *, delivered: Delivered, relay: ChunkSink, guard: StallGuard) -> None:
        self.has_usage = False
        self._delivered = delivered
        self._relay = relay
        self._guard = guard

    async def read(self, response: Response) -> Finish:
        """Reads the answer, as events or, of a provider that does not stream, as one object.

        Raises:
            BackendFailedError: it is no answer, or was cut.
            HttpError: the connection broke.
        """
        if response.content_type == "text/event-stream":
            ending = await self._read_events(response)
        elif response.content_type == "application/json":
            ending = self._take_whole(await read_body(response, MAX_WHOLE_BYTES))
        else:
            raise BackendFailedError(f"the provider answers with {response.content_type}")
        # What the provider told replaces the count of chunks.
        self._delivered.token_count = ending.completion_tokens
        return ending

    async def _read_events(self, response: Response) -> Finish:
        events = CompletionStreamParser()
        chunks = 0
        while not events.done and (data := await response.read()):
            piece = events.feed(data)
            if events.chunks != chunks:
                chunks = events.chunks
                self._guard.progress()
            if piece.token_count:
                self._delivered.add(piece)
                self._relay.put(piece)
            if self._relay.full:
                self._guard.wait()
                await self._relay.room()
                self._guard.progress()
        self.has_usage = events.usage is not None
        ending = events.ending()
        self._relay.put(Chunk("", finish=ending))
        return ending

    def _take_whole(self, body: bytes) -> Finish:
        answer = whole_answer(body)
        self.has_usage = answer.usage is not None
        piece = Chunk(answer.text, (), answer.ending.completion_tokens, answer.ending)
        self._delivered.add(piece)
        self._relay.put(piece)
        return answer.ending


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
