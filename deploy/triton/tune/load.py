"""Closed-loop clients: each sends its next request when the last one is answered."""

from __future__ import annotations

import asyncio
import json
import math
import struct
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

WARM_UP_SECONDS = 1.0
# After the window, running requests may take as long as the window, and at least this long.
MIN_DRAIN_SECONDS = 2.0
ANSWER_TOKENS = 24
_PAUSE_AFTER_ERROR_SECONDS = 0.05
_LENGTH = struct.Struct("<I")
_PROSE = (
    "the mill stands by a river whose water is led through a narrow race to drive its wheel "
    "and when the gate is closed the pond above it fills slowly until evening"
)
_WORDS = _PROSE.split()


@dataclass(frozen=True, kw_only=True)
class Load:
    """What to send, and where."""

    address: str
    model: str
    kind: str
    seconds: float

    @property
    def longest_seconds(self) -> float:
        """The longest duration of one measurement."""
        return WARM_UP_SECONDS + self.seconds + max(MIN_DRAIN_SECONDS, self.seconds)


@dataclass
class Observed:
    """What the clients observed within the window.

    Attributes:
        units: texts or tokens received within the window.
        all_units: those received before and after it as well.
        requests: completed requests.
        errors: failed requests.
        latencies_seconds: of the requests sent within the window. A request that was cancelled
            without an answer counts with the time it had waited.
    """

    units: int = 0
    all_units: int = 0
    requests: int = 0
    errors: int = 0
    latencies_seconds: list[float] = field(default_factory=list)

    def percentile_ms(self, share: float) -> float | None:
        """Returns the latency that this share of the requests does not exceed; None without any."""
        ordered = sorted(self.latencies_seconds)
        return 1000 * ordered[math.ceil(share * len(ordered)) - 1] if ordered else None


async def observe(load: Load, concurrency: int) -> Observed:
    """Runs the clients for a warm-up and the window, and waits for their last requests."""
    async with grpc.aio.insecure_channel(load.address) as channel:
        clients = _Clients(service_pb2_grpc.GRPCInferenceServiceStub(channel), load)
        tasks = [
            asyncio.create_task(clients.run(number, concurrency)) for number in range(concurrency)
        ]
        done, pending = await asyncio.wait(tasks, timeout=load.longest_seconds)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for task in done:
            task.result()
        return clients.observed


class _Clients:
    def __init__(self, stub: service_pb2_grpc.GRPCInferenceServiceStub, load: Load) -> None:
        self.observed = Observed()
        self._stub = stub
        self._load = load
        self._start = time.monotonic() + WARM_UP_SECONDS
        self._end = self._start + load.seconds

    async def run(self, number: int, concurrency: int) -> None:
        # The first answers have different lengths, so that the clients are not synchronised.
        tokens = max(1, ANSWER_TOKENS * (number + 1) // concurrency)
        sent = 0
        while time.monotonic() < self._end:
            text = _text(number * 7919 + sent)
            await self._request(text, ANSWER_TOKENS if sent else tokens)
            sent += 1

    async def _request(self, text: str, max_tokens: int) -> None:
        sent_at = time.monotonic()
        counts = self._start <= sent_at < self._end
        answered = False
        try:
            async for units in self._units(text, max_tokens):
                now = time.monotonic()
                if counts and not answered:
                    self.observed.latencies_seconds.append(now - sent_at)
                answered = True
                self.observed.all_units += units
                self.observed.units += units if self._start <= now < self._end else 0
            self.observed.requests += 1
        except (grpc.aio.AioRpcError, RuntimeError):
            self.observed.errors += 1
            await asyncio.sleep(_PAUSE_AFTER_ERROR_SECONDS)
        except asyncio.CancelledError:
            if counts and not answered:
                self.observed.latencies_seconds.append(time.monotonic() - sent_at)
            raise

    async def _units(self, text: str, max_tokens: int) -> AsyncIterator[int]:
        """Yields the number of texts or tokens of each message as it arrives."""
        if self._load.kind == "embedding":
            await self._stub.ModelInfer(self._infer_request("text", text.encode(), [1, 1]))
            yield 1
            return
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        request = self._infer_request("request", json.dumps(body).encode(), [1])
        call = self._stub.ModelStreamInfer(iter([request]))
        try:
            async for message in call:
                if message.error_message:
                    raise RuntimeError(message.error_message)
                shapes = {each.name: each.shape for each in message.infer_response.outputs}
                yield shapes["token_ids"][0]
        finally:
            call.cancel()

    def _infer_request(
        self, name: str, value: bytes, shape: Sequence[int]
    ) -> service_pb2.ModelInferRequest:
        tensor = service_pb2.ModelInferRequest.InferInputTensor(
            name=name, datatype="BYTES", shape=shape
        )
        return service_pb2.ModelInferRequest(
            model_name=self._load.model,
            inputs=[tensor],
            raw_input_contents=[_LENGTH.pack(len(value)) + value],
        )


def _text(number: int) -> str:
    """Returns a text of 6 to 29 words. Texts of adjacent numbers differ from the first word on."""
    length = 6 + number % 24
    words = [_WORDS[(number + index * (1 + number % 5)) % len(_WORDS)] for index in range(length)]
    return f"{number} {' '.join(words)}"
