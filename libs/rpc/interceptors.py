"""The interceptor of `grpc.aio` servers: RPCs run through `serve_call`; servicers only raise."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn, TypeAlias

import grpc
from typing_extensions import override

from libs.clock import Clock
from libs.errors import HeadraceError, InvalidArgument, Unimplemented
from libs.rpc.access import OPEN
from libs.rpc.call_observer import GrpcObserver
from libs.rpc.deadlines import DEADLINE_MARGIN_SECONDS, Deadline, Deadlines
from libs.rpc.framing import PREFIX
from libs.rpc.identity import Identity, identity_of
from libs.rpc.served_call import (
    MAX_OPEN_REQUEST_BYTES,
    MAX_REQUEST_BYTES,
    read_message,
    serve_call,
)
from libs.rpc.status import DETAILS_KEY, grpc_code, to_status

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Behavior = Callable[[Any, Any], Any]

# What a caller still sends when its call fails is read for so long, up to so many bytes.
READ_OUT_SECONDS = 0.5
READ_OUT_BYTES = 16 * 1024 * 1024
ABORT_SECONDS = 5.0
# In one stream of a method that needs no token: reflection of each service takes a few.
MAX_OPEN_REQUESTS = 1024

_PLUMBING = ("/grpc.health.", "/grpc.reflection.")
_TRACE_KEYS = frozenset({"traceparent", "tracestate"})


def _is_traced(method: str) -> bool:
    """Returns whether calls have a span.

    Watches do not, since they last for days; health and reflection do not, since each second has
    one that says nothing about the work.
    """
    return "/Watch" not in method and not method.startswith(_PLUMBING)


class ServedCalls(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in stubs only
    """Runs each call through `serve_call`, which also parses its messages."""

    def __init__(self, clock: Clock, scope_of: Callable[[str], str]) -> None:
        """Creates the interceptor; `scope_of` returns the scope that a method's path requires."""
        self._clock = clock
        self._scope_of = scope_of
        self._deadlines = Deadlines()
        self._handlers: dict[str, Handler] = {}

    @override
    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Returns the method's handler, wrapped; the same one for every call."""
        method = handler_call_details.method
        known = self._handlers.get(method)
        if known is not None:
            return known
        handler: Handler | None = await continuation(handler_call_details)
        if handler is None:
            return grpc.stream_stream_rpc_method_handler(_unknown(method))
        wrapped = self._handlers[method] = self._wrapped(method, handler)
        return wrapped

    def _wrapped(self, method: str, handler: Handler) -> Handler:
        kinds = {
            (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
            (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
            (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
            (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
        }
        name, factory = kinds[bool(handler.request_streaming), bool(handler.response_streaming)]
        behavior: Behavior = getattr(handler, name)
        if inspect.isasyncgenfunction(behavior):
            behavior = _writing(behavior)
        observer = GrpcObserver(method, traced=_is_traced(method))
        scope = self._scope_of(method)
        parse = handler.request_deserializer
        limits = (MAX_REQUEST_BYTES, -1)
        if scope == OPEN:
            limits = (MAX_OPEN_REQUEST_BYTES, MAX_OPEN_REQUESTS)
        parser = None if parse is None else _Parser(parse, *limits)

        async def call(request: Any, context: Any) -> Any:
            carrier = _AioCall(behavior, request, parser, context, self._deadlines)
            return await serve_call(carrier, observer, self._clock, scope=scope)

        # Without a deserializer, which could not say what is wrong: see `read_message`.
        return factory(call, response_serializer=handler.response_serializer)


class _Parser(NamedTuple):
    """How the messages of a method are parsed.

    Attributes:
        limit_bytes: of one message.
        limit: how many messages a stream may have; -1: any number.
    """

    parse: Callable[[bytes], Any]
    limit_bytes: int
    limit: int

    def one(self, message: bytes) -> Any:
        """Returns a message, parsed.

        Raises:
            InvalidArgument: it cannot be parsed.
        """
        return read_message(self.parse, message, limit_bytes=self.limit_bytes)


class _ParsedMessages(AsyncIterator[Any]):
    """The messages of a stream of requests.

    Not a generator: that could not be read again after a read that was abandoned.
    """

    __slots__ = ("_left", "_messages", "_parser")

    def __init__(self, messages: AsyncIterator[bytes], parser: _Parser) -> None:
        self._messages = messages
        self._parser = parser
        self._left = parser.limit

    @override
    async def __anext__(self) -> Any:
        message = await anext(self._messages)
        if not self._left:
            raise InvalidArgument(
                f"the stream has more than {self._parser.limit} messages; start another one",
                reason="INVALID_FIELD",
            )
        self._left -= 1
        return self._parser.one(message)


class _AioCall:
    """A call that `grpc.aio` carries."""

    __slots__ = ("_behavior", "_context", "_deadlines", "_parser", "_request")

    def __init__(
        self,
        behavior: Behavior,
        request: Any,
        parser: _Parser | None,
        context: Any,
        deadlines: Deadlines,
    ) -> None:
        """Creates a call; `request` is a message or a stream of messages, in bytes."""
        self._behavior = behavior
        self._request = request
        self._parser = parser
        self._context = context
        self._deadlines = deadlines

    @property
    def identity(self) -> Identity:
        return identity_of(self._context)

    async def work(self) -> Any:
        request, parser = self._request, self._parser
        if parser is not None:
            if isinstance(request, bytes):
                request = parser.one(request)
            else:
                request = _ParsedMessages(request, parser)
        return await self._behavior(request, self._context)

    def trace_headers(self) -> Mapping[str, str]:
        metadata = self._context.invocation_metadata() or ()
        return {key: str(value) for key, value in metadata if key in _TRACE_KEYS}

    def start_deadline(self) -> Deadline | None:
        seconds = self._context.time_remaining()
        return None if seconds is None else self._deadlines.after(seconds)

    def end_of(self, raised: Exception) -> str | None:
        """Returns `ABORTED` if the handler, or gRPC itself, ended the call."""
        return "ABORTED" if isinstance(raised, grpc.aio.BaseError) else None

    async def fail(self, error: HeadraceError, *, expected: bool) -> NoReturn:  # noqa: ARG002  # a status says it, expected or not
        if isinstance(self._request, AsyncIterator):
            await _read_out(self._request, self._context.time_remaining())
        await _abort(self._context, error)

    async def succeed(self) -> None:
        """Does nothing: gRPC sends the status."""


def _unknown(method: str) -> Behavior:
    # The edge records the message, and a query may hold a secret.
    text = f"no method {method.partition('?')[0]}"

    async def refuse(_request: Any, context: Any) -> None:
        await _abort(context, Unimplemented(text, reason="METHOD_NOT_FOUND"))

    return refuse


async def _read_out(requests: AsyncIterator[bytes], remaining_seconds: float | None) -> None:
    """Reads on for a while: a client of grpc.aio whose send fails never sees the status."""

    async def read() -> None:
        left = READ_OUT_BYTES
        async for message in requests:
            left -= PREFIX.size + len(message)
            if left < 0:
                return

    reading = asyncio.ensure_future(read())
    # Not cancelled, since that would cancel the RPC: it ends with the RPC.
    reading.add_done_callback(lambda done: done.cancelled() or done.exception())
    limit = READ_OUT_SECONDS
    if remaining_seconds is not None:
        limit = min(limit, max(0.0, remaining_seconds - DEADLINE_MARGIN_SECONDS))
    await asyncio.wait({reading}, timeout=limit)


async def _abort(context: Any, error: HeadraceError) -> NoReturn:
    status = to_status(error)
    details = status.SerializeToString()
    # Waits behind what the client has not read yet, up to a limit.
    with suppress(TimeoutError):
        async with asyncio.timeout(ABORT_SECONDS):
            await context.abort(grpc_code(error), status.message, ((DETAILS_KEY, details),))
    raise grpc.aio.AbortError


def _writing(generator: Callable[[Any, Any], AsyncIterator[Any]]) -> Behavior:
    async def write_all(request: Any, context: Any) -> None:
        messages = generator(request, context)
        try:
            async for message in messages:
                await context.write(message)
        finally:
            await messages.aclose()  # type: ignore[attr-defined]  # frees what it holds immediately

    return write_all
