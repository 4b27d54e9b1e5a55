"""A mock Triton with token streams; it can fail in ways that a real one rarely does."""

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

TOKENS = {7: "one ", 8: "two ", 9: "three ", 10: "four "}
TEXT = "".join(TOKENS.values())
# The ID of a token that the engine does not report.
UNKNOWN = -1


@dataclass
class MockTriton:
    """A running server. It answers with the tokens that the request does not have yet.

    Attributes:
        address: `host:port`.
        dies_after: number of tokens after which it aborts the stream, or None.
        stalls_after: number of tokens after which it stalls, or None.
        error_message: of the model, in place of an answer; empty: it answers.
        stalls_counting: whether requests for numbers of tokens get no answer.
        hidden: number of further tokens, without text and ID, after each token.
        final: fields to add or replace in the JSON at the end.
        requests: the JSON of all requests so far.
        timeouts: timeouts of the calls so far, in seconds; None: no timeout.
        left: set when a client cancels its call.
    """

    address: str = ""
    dies_after: int | None = None
    stalls_after: int | None = None
    error_message: str = ""
    stalls_counting: bool = False
    hidden: int = 0
    final: dict[str, Any] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    timeouts: list[float | None] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def _answer_without_tokens(self, body: dict[str, Any]) -> Any | None:
        """Returns an error or a number of tokens, if the test or the request asks for one."""
        if self.error_message:
            return service_pb2.ModelStreamInferResponse(error_message=self.error_message)
        if body.get("operation") != "count_tokens":
            return None
        if self.stalls_counting:
            await asyncio.sleep(3600)
        return _response("", [], json.dumps({"prompt_tokens": 5}).encode())

    async def answer(self, request: Any, context: Any) -> AsyncIterator[Any]:
        body = json.loads(request.raw_input_contents[0][4:])
        self.requests.append(body)
        self.timeouts.append(context.time_remaining())
        if (other := await self._answer_without_tokens(body)) is not None:
            yield other
            return
        delivered = len((body.get("resume") or {"pieces": []})["pieces"])
        try:
            for count, (token, text) in enumerate(list(TOKENS.items())[delivered:]):
                if count == self.stalls_after:
                    await asyncio.sleep(3600)
                for _ in range(self.hidden):
                    yield _response("", [UNKNOWN], b"")
                if count == self.dies_after:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
                yield _response(text, [token], b"")
            final = {"finish_reason": "stop", "prompt_tokens": 5, "cached_tokens": 0}
            final |= {"completion_tokens": len(TOKENS) - delivered} | self.final
            yield _response("", [], json.dumps(final).encode())
        except asyncio.CancelledError:
            self.left.set()
            raise


@asynccontextmanager
async def mock_triton(**behaviour: Any) -> AsyncIterator[MockTriton]:
    """Runs a server on a free port."""
    triton = MockTriton(**behaviour)
    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(
        triton.answer,
        request_deserializer=service_pb2.ModelInferRequest.FromString,
        response_serializer=service_pb2.ModelStreamInferResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                "inference.GRPCInferenceService", {"ModelStreamInfer": handler}
            ),
        )
    )
    triton.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield triton
    finally:
        await server.stop(None)


def _response(text: str, tokens: list[int], final: bytes) -> Any:
    outputs = {
        "text": _bytes(text.encode()),
        "token_ids": struct.pack(f"<{len(tokens)}i", *tokens),
        "final": _bytes(final),
    }
    return service_pb2.ModelStreamInferResponse(
        infer_response=service_pb2.ModelInferResponse(
            outputs=[
                service_pb2.ModelInferResponse.InferOutputTensor(name=name) for name in outputs
            ],
            raw_output_contents=list(outputs.values()),
        )
    )


def _bytes(value: bytes) -> bytes:
    return struct.pack("<I", len(value)) + value
