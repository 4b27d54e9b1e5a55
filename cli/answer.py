"""Streams one answer to the terminal and keeps what came with it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from rich.console import Console

from deploy.local.edge_client import EdgeClient, retry_seconds

RETRIES = 10
MAX_RETRY_PAUSE_SECONDS = 2.0
NANO_USD_PER_USD = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One whole answer.

    Attributes:
        first_token_seconds: from the call to the first token, as seen here.
        tokens_per_second: of the tokens after the first; 0 where there is no second.
    """

    text: str
    final: inference_pb2.Final
    first_token_seconds: float
    tokens_per_second: float


def stream_answer(
    edge: EdgeClient, request: inference_pb2.GenerateRequest, console: Console
) -> Answer:
    """Prints the answer as it comes and returns it.

    Calls again, as often as `RETRIES`, while the mesh says that it will soon be ready.

    Raises:
        grpc.RpcError: the call failed otherwise, or too often.
    """
    for _ in range(RETRIES):
        try:
            return _stream_once(edge, request, console)
        except grpc.RpcError as error:
            pause = retry_seconds(error)
            if pause is None or error.code() != grpc.StatusCode.UNAVAILABLE:
                raise
            time.sleep(min(pause, MAX_RETRY_PAUSE_SECONDS))
    return _stream_once(edge, request, console)


def dollars(nano_usd: int) -> str:
    """Returns an amount in dollars, exact to the nano-dollar."""
    whole, rest = divmod(nano_usd, NANO_USD_PER_USD)
    return f"${whole}.{rest:09}"


def _stream_once(
    edge: EdgeClient, request: inference_pb2.GenerateRequest, console: Console
) -> Answer:
    began = time.monotonic()
    arrivals: list[tuple[float, int]] = []
    texts: list[str] = []
    stub = inference_pb2_grpc.InferenceServiceStub(edge.channel)
    for message in stub.Generate(request, metadata=edge.metadata):
        if message.HasField("delta"):
            arrivals.append((time.monotonic(), message.delta.token_count))
            texts.append(message.delta.text)
            console.print(message.delta.text, end="", markup=False, highlight=False, soft_wrap=True)
        elif message.HasField("final"):
            console.print()
            return Answer(
                text="".join(texts),
                final=message.final,
                first_token_seconds=(arrivals[0][0] if arrivals else time.monotonic()) - began,
                tokens_per_second=_rate(arrivals),
            )
    raise AssertionError("a stream that ends with OK has a final message")


def _rate(arrivals: Sequence[tuple[float, int]]) -> float:
    if len(arrivals) < 2:  # noqa: PLR2004 - one interval needs two arrivals
        return 0.0
    seconds = arrivals[-1][0] - arrivals[0][0]
    return sum(count for _, count in arrivals[1:]) / seconds if seconds > 0 else 0.0
