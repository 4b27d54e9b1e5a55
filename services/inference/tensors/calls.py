"""One call of the Open Inference Protocol at one Triton: bytes in, bytes out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from services.inference.backends.stall import StallGuard
from services.inference.backends.triton.client import Triton
from services.inference.backends.triton.errors import triton_error
from services.inference.tensors.codec import StreamedResponse, read_streamed

# Receives each message of a stream, with what was read of it.
OnMessage = Callable[[bytes, StreamedResponse], Awaitable[None]]


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
        raise _failure(error, request_id) from None
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
                        raise triton_error(
                            streamed.error_message, request_id=request_id, callers_tensors=True
                        )
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
        raise _failure(error, "") from None


def _failure(error: grpc.aio.AioRpcError, request_id: str) -> Exception:
    return triton_error(
        error.details() or "", code=error.code(), request_id=request_id, callers_tensors=True
    )
