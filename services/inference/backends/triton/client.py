"""A Triton server as a backend.

Streams are read as bytes by `libs.grpc_stream`, because the cost of a token is the cost of its
message. Each answer has a stream of its own, so that cancelling the call stops the generation.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from typing import Any

import grpc
from opentelemetry import propagate

from libs.chat.request import Message
from libs.clock import Clock
from libs.grpc_stream import ServerStreamCall, ServerStreamClient, ServerStreamError
from libs.rpc.channel import open_channel
from libs.tls import TlsFiles
from services.inference.backends.chat import ChunkSink
from services.inference.backends.stall import StallGuard, StallLimits
from services.inference.backends.triton import codec
from services.inference.backends.triton.errors import answer_too_large, triton_error
from services.inference.deadlines import deadline_exceeded, seconds_left
from services.inference.domain import BackendFailedError, ChatCall, Chunk, Delivered, Finish

SERVICE = "inference.GRPCInferenceService"


class Triton:
    """One Triton server.

    Every method ends when the caller's deadline passes, with `DeadlineExceeded`.

    Attributes:
        stall_limits: how long it may be silent.
    """

    def __init__(
        self, address: str, *, stall: StallLimits, clock: Clock, tls: TlsFiles | None = None
    ) -> None:
        """Makes a client of a `host:port` or `unix:/path`, which connects when it is first used."""
        # No tracing and no retries in gRPC: attempts are made, and traced, by the callers.
        self._channel = open_channel(address, tls=tls, traced=False, retries=False)
        self._streams = ServerStreamClient(address, tls=tls)
        self._clock = clock
        self._methods: dict[tuple[str, Any], Any] = {}
        self.stall_limits = stall

    async def generate(
        self,
        backend_model: str,
        call: ChatCall,
        *,
        max_tokens: int,
        delivered: Delivered,
        relay: ChunkSink,
    ) -> Finish:
        """See `ChatBackend.generate`."""
        request = codec.chat_request(
            backend_model, call, max_tokens=max_tokens, delivered=delivered
        )
        held: Chunk | None = None  # no engine could continue after it
        with StallGuard(self.stall_limits) as guard:
            async with self.stream(request, deadline_seconds=call.deadline_seconds) as stream:
                while messages := await stream.read():
                    for message in messages:
                        chunk = codec.read_chunk(message)
                        if held is not None:
                            chunk, held = held.followed_by(chunk), None
                        if not delivered.add(chunk):
                            held = chunk
                            continue
                        relay.put(chunk)
                        if chunk.finish is not None:
                            return chunk.finish
                        if relay.full:
                            guard.pause()
                            await relay.room()
                    guard.progress()
        # The model says when it is done: without that the answer is cut, whatever the status.
        raise BackendFailedError("the stream ended before the answer was complete")

    async def count_tokens(
        self, backend_model: str, messages: Sequence[Message], *, deadline_seconds: float | None
    ) -> int:
        """Returns how many tokens a conversation has as a prompt.

        Raises:
            BackendFailedError: the backend failed.
            HeadraceError: the model refuses the request.
        """
        request = codec.count_request(backend_model, messages)
        with StallGuard(self.stall_limits):
            async with self.stream(request, deadline_seconds=deadline_seconds) as stream:
                while answers := await stream.read():
                    for answer in answers:
                        if (count := codec.read_prompt_tokens(answer)) is not None:
                            return count
        raise BackendFailedError("the stream ended before the tokens were counted")

    async def embed(
        self, backend_model: str, texts: Sequence[str], *, deadline_seconds: float | None
    ) -> list[tuple[bytes, int]]:
        """Returns for each text its vector, as little-endian float32, and its number of tokens.

        Raises:
            BackendFailedError: the backend failed.
            HeadraceError: the model refuses the request.
        """
        request = codec.embed_request(backend_model, texts)
        try:
            answer = await self.call("ModelInfer", request, deadline_seconds=deadline_seconds)
        except grpc.aio.AioRpcError as error:
            # Without the cause: its text may quote the request, and spans have the causes.
            raise triton_error(error.details() or "", code=error.code()) from None
        return codec.read_embeddings(answer, texts=len(texts))

    async def call(
        self,
        method: str,
        request: Any,
        *,
        deadline_seconds: float | None,
        response_type: Any = None,
    ) -> Any:
        """Calls a unary method, within the time that Triton has for a first token.

        Args:
            method: of Triton's service.
            request: a message, or bytes where no response type is given.
            deadline_seconds: the caller's deadline, on the clock's monotonic time.
            response_type: the type of the answer; None: bytes.

        Raises:
            AioRpcError: Triton ended the call with an error, or was silent for too long.
        """
        limit = self.stall_limits.first_token_seconds
        left = seconds_left(deadline_seconds, self._clock, waiting_for="backend")
        is_callers_limit = left is not None and left < limit
        try:
            return await self._method(method, request, response_type)(
                request, metadata=_trace_metadata(), timeout=left if is_callers_limit else limit
            )
        except grpc.aio.AioRpcError as error:
            if is_callers_limit and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise deadline_exceeded("backend") from error
            raise

    @asynccontextmanager
    async def stream(
        self, request: bytes, *, deadline_seconds: float | None
    ) -> AsyncIterator[ServerStreamCall]:
        """Calls `ModelStreamInfer` with one request, for as long as a block runs.

        Raises:
            BackendFailedError: Triton cannot be reached, or ended the stream with an error.
        """
        left = seconds_left(deadline_seconds, self._clock, waiting_for="backend")
        try:
            call = await self._streams.call(
                f"/{SERVICE}/ModelStreamInfer", request, _trace_metadata(), timeout_seconds=left
            )
            with closing(call):
                yield call
        except ServerStreamError as error:
            if left is not None and error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise deadline_exceeded("backend") from error
            if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise answer_too_large() from error
            raise BackendFailedError(str(error)) from error

    async def close(self) -> None:
        """Closes all connections."""
        await self._streams.close()
        await self._channel.close(None)

    def _method(self, name: str, request: Any, response_type: Any) -> Any:
        found = self._methods.get((name, response_type))
        if found is None:
            as_bytes = response_type is None
            found = self._methods[name, response_type] = self._channel.unary_unary(
                f"/{SERVICE}/{name}",
                request_serializer=None if as_bytes else type(request).SerializeToString,
                response_deserializer=None if as_bytes else response_type.FromString,
            )
        return found


def _trace_metadata() -> tuple[tuple[str, str], ...]:
    """Returns the metadata that continues the current trace."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple(carrier.items())
