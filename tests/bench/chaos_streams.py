"""Streams of a client that retries correctly while processes are killed."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc

from libs.chat.wire import text_message

MAX_TRIES = 40
RETRY_SECONDS = 0.5

QUESTIONS = [
    f"{ask} {thing}?"
    for ask in ("What is", "Why do people like", "Tell me a story about", "How do you draw")
    for thing in ("a river", "the moon", "bread", "a bicycle", "snow")
]


@dataclass
class StreamResult:
    """One answer, as its client received it.

    Attributes:
        breaks: how often the stream broke and the client continued with `resume_from`.
        resumed: how often the mesh replaced a backend without the client noticing.
    """

    question: str
    text: str = ""
    token_count: int = 0
    breaks: int = 0
    resumed: int = 0
    final: inference_pb2.Final | None = None
    errors: list[str] = field(default_factory=list)


async def answer(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub,
    question: str,
    *,
    metadata: Sequence[tuple[str, str]],
    max_tokens: int,
) -> StreamResult:
    """Sends a request, and continues it with the same request ID when the stream breaks."""
    result = StreamResult(question)
    request = inference_pb2.GenerateRequest(
        request_id=str(uuid.uuid4()),
        model="smollm2",
        messages=[text_message(inference_pb2.ROLE_USER, question)],
        max_tokens=max_tokens,
    )
    for _ in range(MAX_TRIES):
        try:
            async for response in stub.Generate(request, metadata=tuple(metadata)):
                if response.HasField("final"):
                    result.final = response.final
                    result.resumed += response.final.resumed_count
                elif response.HasField("delta"):
                    result.text += response.delta.text
                    result.token_count += response.delta.token_count
                    request.resume_from = response.delta.resume_token
        except grpc.aio.AioRpcError as error:
            result.errors.append(f"{error.code().name}: {error.details()}")
            if not is_broken_stream(error):
                return result
            result.breaks += 1
            await asyncio.sleep(RETRY_SECONDS)
        else:
            return result
    return result


def is_broken_stream(error: grpc.aio.AioRpcError) -> bool:
    """Returns whether a replica died: `UNAVAILABLE`, or a reset in the middle of the stream.

    Envoy cannot send trailers after headers; gRPC clients report its reset as `INTERNAL`.
    """
    reset = error.code() is grpc.StatusCode.INTERNAL and "RST_STREAM" in (error.details() or "")
    return reset or error.code() is grpc.StatusCode.UNAVAILABLE
