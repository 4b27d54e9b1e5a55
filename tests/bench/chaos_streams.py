"""Greedy streams under kills, as seen by a client that retries as it should."""

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
class Seen:
    """What one client saw of one answer.

    Attributes:
        breaks: how often its stream broke, and it continued with `resume_from`.
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
) -> Seen:
    """Asks once, and continues with the same request id wherever the stream breaks."""
    seen = Seen(question)
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
                    seen.final = response.final
                    seen.resumed += response.final.resumed_count
                elif response.HasField("delta"):
                    seen.text += response.delta.text
                    seen.token_count += response.delta.token_count
                    request.resume_from = response.delta.resume_token
        except grpc.aio.AioRpcError as error:
            seen.errors.append(f"{error.code().name}: {error.details()}")
            if not broke_off(error):
                return seen
            seen.breaks += 1
            await asyncio.sleep(RETRY_SECONDS)
        else:
            return seen
    return seen


def broke_off(error: grpc.aio.AioRpcError) -> bool:
    """Returns whether a replica died: `UNAVAILABLE`, or a reset in the middle of the stream.

    Envoy cannot send trailers once headers are out; gRPC clients read its reset as `INTERNAL`.
    """
    reset = error.code() is grpc.StatusCode.INTERNAL and "RST_STREAM" in (error.details() or "")
    return reset or error.code() is grpc.StatusCode.UNAVAILABLE
