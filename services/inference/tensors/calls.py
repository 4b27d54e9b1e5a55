"""One call of the Open Inference Protocol at one Triton: bytes in, bytes out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from libs.errors import HeadraceError, Internal, InvalidArgument
from services.inference.backends.stall import StallGuard
from services.inference.backends.triton.client import Triton
from services.inference.backends.triton.errors import error_of_model
from services.inference.domain import BackendFailedError
from services.inference.tensors.codec import StreamedResponse, read_streamed

# Receives each message of a stream, with what was read of it.
OnMessage = Callable[[bytes, StreamedResponse], Awaitable[None]]

_CALLERS_FAULT = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
    }
)
# On a stream Triton gives no status, only a text. These are the beginnings of texts about a failure
# of the backend; all others count as the caller's fault, so that the mistakes of one caller do not
# open the breaker for all.
_BACKENDS_FAULT = (
    "Request for unknown model",
    "Exceeds maximum queue size",
    "Request timeout expired",
    "Server is ",
)
_MODEL_FAILED = "Failed to process the request(s)"
_MODEL_STOPPED = "is not healthy"


async def infer(
    triton: Triton, request: bytes, *, request_id: str, deadline_seconds: float | None
) -> bytes:
    """Returns the answer to one `ModelInfer`.

    Raises:
        BackendFailedError: the backend failed.
        HeadraceError: the request is wrong, or the deadline passed.
    """
    try:
        answer: bytes = await triton.call("ModelInfer", request, deadline_seconds=deadline_seconds)
    except grpc.aio.AioRpcError as error:
        raise _failure(error, request_id) from error
    return answer


async def stream(
    triton: Triton,
    request: bytes,
    *,
    request_id: str,
    deadline_seconds: float | None,
    on_message: OnMessage,
) -> None:
    """Passes on every message that answers a `ModelStreamInfer` of one request.

    Raises:
        BackendFailedError: the backend failed.
        HeadraceError: the request is wrong, or the deadline passed.
    """
    with StallGuard(triton.stall_limits) as guard:
        async with triton.stream(request, deadline_seconds=deadline_seconds) as answers:
            while messages := await answers.read():
                for message in messages:
                    streamed = read_streamed(message)
                    if streamed.error_message:
                        raise _error(streamed.error_message, request_id)
                    guard.pause()  # from here on the reader may be the slow one
                    await on_message(message, streamed)
                    guard.progress()


async def describe(
    triton: Triton,
    method: str,
    request: Any,
    response_type: Any,
    *,
    deadline_seconds: float | None,
) -> Any:
    """Returns Triton's description of a model, as a `response_type`.

    Raises:
        BackendFailedError: the backend failed.
        HeadraceError: the request is wrong, or the deadline passed.
    """
    try:
        return await triton.call(
            method, request, deadline_seconds=deadline_seconds, response_type=response_type
        )
    except grpc.aio.AioRpcError as error:
        raise _failure(error, "") from error


def _failure(error: grpc.aio.AioRpcError, request_id: str) -> Exception:
    text = error.details() or error.code().name
    if error.code() not in _CALLERS_FAULT and error.code() is not grpc.StatusCode.INTERNAL:
        return BackendFailedError(f"{error.code().name}: {text}")
    return _error(text, request_id)


def _error(text: str, request_id: str) -> HeadraceError | BackendFailedError:
    """Returns the error for a text of Triton's. The text may quote the request."""
    if text.startswith("{"):  # one of Headrace's models says it itself
        return error_of_model(text)
    unquoted = text.removeprefix(f"[request id: {request_id}] ")
    if unquoted.startswith(_BACKENDS_FAULT):
        return BackendFailedError(text)
    if unquoted.startswith(_MODEL_FAILED):
        if _MODEL_STOPPED in unquoted:
            return BackendFailedError(text)
        return Internal(text, reason="INTERNAL")
    return InvalidArgument(text, reason="INVALID_FIELD")
