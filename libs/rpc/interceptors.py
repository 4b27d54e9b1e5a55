"""What happens around every RPC on the server's side.

`TracedCalls` makes the span; inside it `HandledCalls` keeps the deadline, counts, logs and
turns whatever is raised into a status with `ErrorInfo`. Servicers only raise.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, NoReturn, TypeAlias

import grpc
from opentelemetry import trace
from opentelemetry.context import attach, detach
from opentelemetry.instrumentation.grpc._aio_server import (
    OpenTelemetryAioServerInterceptor,
    _OpenTelemetryAioServicerContext,
)
from typing_extensions import override

from libs.clock import Clock
from libs.errors import HeadraceError, Unimplemented
from libs.rpc.call_observer import (
    DEADLINE_MARGIN_SECONDS,
    CallObserver,
    check_size,
    within_deadline,
)
from libs.rpc.status import DETAILS_KEY, as_headrace_error, grpc_code, to_status
from libs.telemetry.tracing import unsampled_context

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Behavior = Callable[[Any, Any], Any]

# What a caller still sends when its call fails is read for so long, up to so many bytes.
READ_OUT_SECONDS = 0.5
READ_OUT_BYTES = 16 * 1024 * 1024
ABORT_SECONDS = 5.0

_PLUMBING = ("/grpc.health.", "/grpc.reflection.")


def _is_traced(details: grpc.HandlerCallDetails) -> bool:
    return not details.method.startswith(_PLUMBING) and "/Watch" not in details.method


class TracedCalls(OpenTelemetryAioServerInterceptor):
    """Makes a server span of each call but health, reflection and `Watch…`, which last for days.

    Differs from the stock interceptor in one thing: it awaits a streaming handler instead of
    passing each message through a generator of its own, because tokens come this way.
    """

    def __init__(self) -> None:
        super().__init__(  # type: ignore[no-untyped-call]  # ships no types
            trace.get_tracer("headrace.rpc"),
            filter_=_is_traced,
        )

    @override
    def _intercept_aio_server_stream(self, behavior: Behavior, details: Any) -> Behavior:
        async def stream(request: Any, context: Any) -> None:
            unsampled = unsampled_context(_traceparent(context))
            if unsampled is not None:
                token = attach(unsampled)
                try:
                    await behavior(request, context)
                finally:
                    detach(token)
                return
            with (
                self._set_remote_context(context),
                self._start_span(  # type: ignore[no-untyped-call]  # ships no types
                    details, context, set_status_on_exception=False
                ) as span,
            ):
                await behavior(request, _OpenTelemetryAioServicerContext(context, span))

        return stream


def _traceparent(context: Any) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == "traceparent":
            return str(value)
    return None


class HandledCalls(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in stubs only
    """Deadline, metrics and errors of each call, and a log line of what went wrong."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
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
            return grpc.stream_stream_rpc_method_handler(self._unknown(method))
        if method.startswith(_PLUMBING):
            return handler
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
            behavior = _written(behavior)

        async def call(request: Any, context: Any) -> Any:
            return await self._call(method, behavior, request, context)

        return factory(
            call,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _unknown(self, method: str) -> Behavior:
        async def refuse(_request: Any, context: Any) -> None:
            error = Unimplemented(f"no method {method}", reason="METHOD_NOT_FOUND")
            await _abort(context, error)

        return refuse

    async def _call(self, method: str, behavior: Behavior, request: Any, context: Any) -> Any:
        handling = CallObserver(method, self._clock)
        status = "OK"
        try:
            check_size(request)
            return await within_deadline(behavior(request, context), context.time_remaining())
        except asyncio.CancelledError:
            status = "CANCELLED"
            raise
        except grpc.aio.BaseError:  # an abort of the handler's own, or of the stack
            status = "ABORTED"
            raise
        except Exception as raised:  # noqa: BLE001  # the boundary: everything becomes a status
            error = as_headrace_error(raised)
            status = error.code
            if isinstance(request, AsyncIterator):
                await _read_out(request, context.time_remaining())
            await _abort(context, error)
        finally:
            handling.end(status)


async def _read_out(requests: AsyncIterator[Any], remaining_seconds: float | None) -> None:
    """Reads on for a while: a client of grpc.aio whose send fails never sees the status."""

    async def read() -> None:
        left = READ_OUT_BYTES
        async for message in requests:
            left -= len(message) if isinstance(message, bytes) else message.ByteSize()
            if left < 0:
                return

    reading = asyncio.ensure_future(read())
    # Left to end with the RPC: to cancel a read is to cancel the RPC.
    reading.add_done_callback(lambda done: done.cancelled() or done.exception())
    limit = READ_OUT_SECONDS
    if remaining_seconds is not None:
        limit = min(limit, max(0.0, remaining_seconds - DEADLINE_MARGIN_SECONDS))
    await asyncio.wait({reading}, timeout=limit)


async def _abort(context: Any, error: HeadraceError) -> NoReturn:
    status = to_status(error)
    details = status.SerializeToString()
    # Sent at once, but behind what the caller has not read yet: it does not hold us up for ever.
    with suppress(TimeoutError):
        async with asyncio.timeout(ABORT_SECONDS):
            await context.abort(grpc_code(error), status.message, ((DETAILS_KEY, details),))
    raise grpc.aio.AbortError


def _written(generator: Callable[[Any, Any], AsyncIterator[Any]]) -> Behavior:
    async def write_all(request: Any, context: Any) -> None:
        messages = generator(request, context)
        try:
            async for message in messages:
                await context.write(message)
        finally:
            await messages.aclose()  # type: ignore[attr-defined]  # what it holds is freed now

    return write_all
