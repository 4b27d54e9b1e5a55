"""A mock Triton with unary and streaming inference."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from services.inference.backends.triton.client import SERVICE

FINAL = {"finish_reason": "stop", "prompt_tokens": 9, "completion_tokens": 3, "cached_tokens": 2}


@dataclass
class TensorServer:
    """Answers like Triton, or fails as the test sets it.

    Attributes:
        fails: status and message of all unary calls, or None.
        error_message: message that streams send instead of an answer.
        dies_after: number of messages after which a stream is aborted.
        final: last message of a stream; if empty, it is not sent.
        stalls: whether unary calls get no answer, and streams stall before their end.
        timeouts: timeouts of the calls so far, in seconds; None: no timeout.
        left: set when a client cancels its call.
        gate: unary calls wait until it is set.
    """

    fails: tuple[grpc.StatusCode, str] | None = None
    error_message: str = ""
    dies_after: int | None = None
    final: dict[str, Any] = field(default_factory=lambda: dict(FINAL))
    stalls: bool = False
    address: str = ""
    requests: list[Any] = field(default_factory=list)
    timeouts: list[float | None] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    async def infer(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        self.timeouts.append(context.time_remaining())
        if self.fails:
            await context.abort(*self.fails)
        if self.stalls:
            await asyncio.sleep(3600)
        await self.gate.wait()
        return _answer(request, embedding=bytes(8), token_count=struct.pack("<2i", 3, 4))

    async def config(self, request: Any, _context: Any) -> Any:
        self.requests.append(request)
        return service_pb2.ModelConfigResponse(config={"name": request.name, "max_batch_size": 8})

    async def stream(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        try:
            async for request in requests:
                self.requests.append(request)
                self.timeouts.append(context.time_remaining())
                if self.error_message:
                    yield service_pb2.ModelStreamInferResponse(error_message=self.error_message)
                    continue
                for count in range(3):
                    if count == self.dies_after:
                        await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
                    yield _streamed(request, ids=[count], final={})
                if self.stalls:
                    await asyncio.sleep(3600)
                if self.final:
                    yield _streamed(request, ids=[], final=self.final)
        except asyncio.CancelledError:
            self.left.set()
            raise


@asynccontextmanager
async def serving(triton: TensorServer) -> AsyncIterator[None]:
    """Runs the server on a free port."""
    server = grpc.aio.server()
    request_type = service_pb2.ModelInferRequest
    handlers: dict[str, Any] = {
        "ModelInfer": grpc.unary_unary_rpc_method_handler(
            triton.infer,
            request_deserializer=request_type.FromString,
            response_serializer=service_pb2.ModelInferResponse.SerializeToString,
        ),
        "ModelConfig": grpc.unary_unary_rpc_method_handler(
            triton.config,
            request_deserializer=service_pb2.ModelConfigRequest.FromString,
            response_serializer=service_pb2.ModelConfigResponse.SerializeToString,
        ),
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
            triton.stream,
            request_deserializer=request_type.FromString,
            response_serializer=service_pb2.ModelStreamInferResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    triton.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


def _answer(request: Any, **outputs: bytes) -> Any:
    return service_pb2.ModelInferResponse(
        model_name=request.model_name,
        model_version="1",
        id=request.id,
        outputs=[service_pb2.ModelInferResponse.InferOutputTensor(name=name) for name in outputs],
        raw_output_contents=list(outputs.values()),
    )


def _streamed(request: Any, *, ids: list[int], final: dict[str, Any]) -> Any:
    ending = json.dumps(final).encode() if final else b""
    answer = _answer(
        request,
        text=struct.pack("<I", 0),
        token_ids=struct.pack(f"<{len(ids)}i", *ids),
        final=struct.pack("<I", len(ending)) + ending,
    )
    return service_pb2.ModelStreamInferResponse(infer_response=answer)
