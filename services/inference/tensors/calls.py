"""One attempt of the Open Inference Protocol at one Triton: bytes in, bytes out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, cast

import grpc

from libs.errors import HeadraceError, Internal, InvalidArgument
from services.inference.backends.stall import StallGuard
from services.inference.backends.triton import Triton, error_of, trace_metadata
from services.inference.domain import BackendFailedError
from services.inference.tensors.codec import StreamedResponse, read_streamed

SERVICE = "inference.GRPCInferenceService"

# Takes one message and what it says.
Take = Callable[[bytes, StreamedResponse], Awaitable[None]]

_CALLERS_FAULT = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
    }
)
# On a stream Triton tells no status. How its texts begin where it is the backend that fails; all
# others are taken for the caller's, so that nobody's mistakes open the breaker for all.
_BACKENDS_FAULT = (
    "Request for unknown model",
    "Exceeds maximum queue size",
    "Request timeout expired",
    "Server is ",
)
_MODEL_BROKE = "Failed to process the request(s)"
_MODEL_IS_DEAD = "is not healthy"


async def infer(triton: Triton, request: bytes, *, request_id: str) -> bytes:
    """Returns the answer to one `ModelInfer`.

    Raises:
        BackendFailedError: the backend is at fault.
        HeadraceError: the request is.
    """
    call = triton.channel.unary_unary(f"/{SERVICE}/ModelInfer", None, None)  # bytes
    try:
        answer = await call(
            request,
            metadata=trace_metadata(),
            timeout=triton.stall_limits.first_token_seconds,
        )
    except grpc.aio.AioRpcError as error:
        raise _failure(error, request_id) from error
    return cast(bytes, answer)


async def stream(triton: Triton, request: bytes, *, request_id: str, take: Take) -> None:
    """Hands over what a `ModelStreamInfer` of one request brings.

    Raises:
        BackendFailedError: the backend is at fault.
        HeadraceError: the request is.
    """
    with StallGuard(triton.stall_limits) as guard:
        async with triton.stream(request) as answers:
            while messages := await answers.read():
                for message in messages:
                    streamed = read_streamed(message)
                    if streamed.error_message:
                        raise _told(streamed.error_message, request_id)
                    guard.wait()  # from here on the reader is the slow one
                    await take(message, streamed)
                    guard.progress()


async def describe(triton: Triton, method: str, request: Any, response_type: Any) -> Any:
    """Returns what Triton says of a model, as a `response_type`.

    Raises:
        BackendFailedError: the backend is at fault.
        HeadraceError: the request is.
    """
    call = triton.channel.unary_unary(
        f"/{SERVICE}/{method}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=response_type.FromString,
    )
    try:
        return await call(
            request, metadata=trace_metadata(), timeout=triton.stall_limits.first_token_seconds
        )
    except grpc.aio.AioRpcError as error:
        raise _failure(error, "") from error


def _failure(error: grpc.aio.AioRpcError, request_id: str) -> Exception:
    text = error.details() or error.code().name
    if error.code() not in _CALLERS_FAULT and error.code() is not grpc.StatusCode.INTERNAL:
        return BackendFailedError(f"{error.code().name}: {text}")
    return _told(text, request_id)


def _told(text: str, request_id: str) -> HeadraceError | BackendFailedError:
    """Returns whose fault an error of Triton's is. Its text may quote the request."""
    if text.startswith("{"):  # a model of the bundled contract says it itself
        return error_of(text)
    told = text.removeprefix(f"[request id: {request_id}] ")
    if told.startswith(_BACKENDS_FAULT):
        return BackendFailedError(text)
    if told.startswith(_MODEL_BROKE):
        if _MODEL_IS_DEAD in told:
            return BackendFailedError(text)
        return Internal(text, reason="INTERNAL")
    return InvalidArgument(text, reason="INVALID_FIELD")
