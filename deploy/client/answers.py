"""Streams one answer of a model, and reads from the ledger what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from headrace.cost.v1 import cost_pb2, cost_pb2_grpc
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc

from deploy.client.edge import EdgeClient, retry_seconds

RETRIES = 10
MAX_RETRY_PAUSE_SECONDS = 2.0
LEDGER_SECONDS = 10.0
_LEDGER_PAUSE_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One complete answer.

    Attributes:
        text: all of its text.
        final: the last message of the stream.
        first_token_seconds: from the call to the first token, measured by the client.
        tokens_per_second: of the tokens after the first; 0 if there is no second.
    """

    text: str
    final: inference_pb2.Final
    first_token_seconds: float
    tokens_per_second: float


def stream_answer(
    edge: EdgeClient, request: inference_pb2.GenerateRequest, on_text: Callable[[str], None]
) -> Answer:
    """Calls `on_text` with each chunk of text as it arrives and returns the complete answer.

    Calls again, up to `RETRIES` times, while the mesh answers that it will be ready soon.

    Raises:
        grpc.RpcError: the call failed for another reason, or too often.
    """
    for _ in range(RETRIES):
        try:
            return _stream_once(edge, request, on_text)
        except grpc.RpcError as error:
            pause = retry_seconds(error)
            if pause is None or error.code() != grpc.StatusCode.UNAVAILABLE:
                raise
            time.sleep(min(pause, MAX_RETRY_PAUSE_SECONDS))
    return _stream_once(edge, request, on_text)


def booked_cost(edge: EdgeClient, request_id: str) -> cost_pb2.GetRequestCostResponse:
    """Returns what the ledger has for a request. Waits up to `LEDGER_SECONDS` for its event.

    Raises:
        grpc.RpcError: the call failed, or the ledger still does not have the request.
    """
    stub = cost_pb2_grpc.CostServiceStub(edge.channel)
    request = cost_pb2.GetRequestCostRequest(request_id=request_id)
    deadline = time.monotonic() + LEDGER_SECONDS
    while True:
        try:
            return stub.GetRequestCost(request, metadata=edge.metadata, timeout=LEDGER_SECONDS)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND or time.monotonic() > deadline:
                raise
            time.sleep(_LEDGER_PAUSE_SECONDS)


def tokens_per_second(arrivals: Sequence[tuple[float, int]]) -> float:
    """Returns the rate of the tokens after the first message.

    Args:
        arrivals: the time in seconds and the token count of each message.
    """
    if len(arrivals) < 2:  # noqa: PLR2004 - one interval needs two arrivals
        return 0.0
    seconds = arrivals[-1][0] - arrivals[0][0]
    return sum(count for _, count in arrivals[1:]) / seconds if seconds > 0 else 0.0


def _stream_once(
    edge: EdgeClient, request: inference_pb2.GenerateRequest, on_text: Callable[[str], None]
) -> Answer:
    start = time.monotonic()
    arrivals: list[tuple[float, int]] = []
    texts: list[str] = []
    stub = inference_pb2_grpc.InferenceServiceStub(edge.channel)
    call: Any = stub.Generate(request, metadata=edge.metadata)
    try:
        for message in call:
            if message.HasField("delta"):
                arrivals.append((time.monotonic(), message.delta.token_count))
                texts.append(message.delta.text)
                on_text(message.delta.text)
            elif message.HasField("final"):
                return Answer(
                    text="".join(texts),
                    final=message.final,
                    first_token_seconds=(arrivals[0][0] if arrivals else time.monotonic()) - start,
                    tokens_per_second=tokens_per_second(arrivals),
                )
    finally:
        call.cancel()  # where the user stops it: no token is made after that
    raise AssertionError("a stream that ends with OK has a final message")
