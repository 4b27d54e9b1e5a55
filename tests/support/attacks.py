"""Attacks on a mesh, in a process of their own so that they do not slow down those who measure.

Run `python -m tests.support.attacks NAME ADDRESS TOKEN`. It attacks until it is ended, and then
prints how its calls ended as one JSON object. Tests use `attacking`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import grpc
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from libs.chat.wire import text_message
from libs.openai.bodies import EMBEDDINGS_PATH

MEBIBYTE = 1024 * 1024
LARGE_TENSOR_BYTES = 60 * MEBIBYTE
# Just below the limit of a message of a stream.
STREAM_MESSAGE_BYTES = 8 * MEBIBYTE - 1024
START_SECONDS = 20.0
# An attacker that is refused tries again after so long.
PAUSE_SECONDS = 0.05
_numbers = itertools.count()


def long_text() -> str:
    """Returns a new text of more tokens than the bundled model takes."""
    return f"{uuid.uuid4()} " + "stone water wheel " * 100


class Attacker:
    """Repeats one kind of call.

    Attributes:
        ends: how many calls ended with which status.
    """

    def __init__(self, address: str, token: str) -> None:
        self.ends: Counter[str] = Counter()
        self._address = address
        self._headers = (("authorization", f"Bearer {token}"),)

    async def many_texts(self) -> None:
        """Embeds 2,048 long texts over HTTP: a minute of work."""
        body = {"model": "minilm", "input": [long_text() for _ in range(2048)]}
        async with (
            aiohttp.ClientSession(f"http://{self._address}") as http,
            http.post(EMBEDDINGS_PATH, json=body, headers=dict(self._headers)) as response,
        ):
            await response.read()
            self.ends[str(response.status)] += 1

    async def urgent_chat(self) -> None:
        """Asks for a long answer, with the highest priority."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            request = inference_pb2.GenerateRequest(
                model="smollm2",
                max_tokens=256,
                priority=9,
                messages=[text_message(inference_pb2.ROLE_USER, f"Count from {next(_numbers)}.")],
            )
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            async for _ in stub.Generate(request, metadata=self._headers):
                self.ends["messages"] += 1
            self.ends["OK"] += 1

    async def large_tensors(self) -> None:
        """Sends a tensor of 60 MiB."""
        async with self._tensors() as stub:
            await stub.ModelInfer(_tensor(LARGE_TENSOR_BYTES), metadata=self._headers)
            self.ends["OK"] += 1

    async def large_streams(self) -> None:
        """Sends the same over a stream."""
        await self._stream(iter([_tensor(LARGE_TENSOR_BYTES)]))

    async def many_streams(self) -> None:
        """Sends the largest message that a stream takes, and keeps the stream open."""

        async def messages() -> AsyncIterator[service_pb2.ModelInferRequest]:
            yield _tensor(STREAM_MESSAGE_BYTES)
            await asyncio.sleep(10)

        await self._stream(messages())

    async def _stream(self, messages: Any) -> None:
        async with self._tensors() as stub:
            async for _ in stub.ModelStreamInfer(messages, metadata=self._headers):
                self.ends["answers"] += 1
            self.ends["OK"] += 1

    @contextlib.asynccontextmanager
    async def _tensors(self) -> AsyncIterator[service_pb2_grpc.GRPCInferenceServiceStub]:
        options = [("grpc.max_send_message_length", 64 * MEBIBYTE)]
        async with grpc.aio.insecure_channel(self._address, options=options) as channel:
            yield service_pb2_grpc.GRPCInferenceServiceStub(channel)

    async def repeat(self, attack: Callable[[], Awaitable[None]]) -> None:
        """Repeats an attack until it is cancelled."""
        while True:
            try:
                await attack()
            except grpc.aio.AioRpcError as error:
                self.ends[error.code().name] += 1
            except (aiohttp.ClientError, TimeoutError) as error:
                self.ends[type(error).__name__] += 1
            await asyncio.sleep(PAUSE_SECONDS)


# What is repeated at the same time, and how often.
ATTACKS: dict[str, tuple[Callable[[Attacker], Awaitable[None]], int]] = {
    "many_texts": (Attacker.many_texts, 3),
    "urgent_chat": (Attacker.urgent_chat, 300),
    "large_tensors": (Attacker.large_tensors, 8),
    "large_streams": (Attacker.large_streams, 8),
    "many_streams": (Attacker.many_streams, 100),
}


def _tensor(size_bytes: int) -> service_pb2.ModelInferRequest:
    return service_pb2.ModelInferRequest(
        model_name="minilm", raw_input_contents=[bytes(size_bytes)]
    )


@contextlib.asynccontextmanager
async def attacking(name: str, *, address: str, token: str) -> AsyncIterator[Counter[str]]:
    """Attacks while the block runs; yields how the calls ended, which is filled at its end."""
    ends: Counter[str] = Counter()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", __name__, name, address, token), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        await asyncio.wait_for(process.stdout.readline(), START_SECONDS)
        await asyncio.sleep(2)
        yield ends
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            output, _ = await asyncio.wait_for(process.communicate(), START_SECONDS)
        except TimeoutError:
            process.kill()
            raise
        else:
            ends.update(json.loads(output))


async def main(name: str, address: str, token: str) -> None:
    """Attacks until SIGTERM."""
    attacker = Attacker(address, token)
    attack, count = ATTACKS[name]
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    tasks = [asyncio.create_task(attacker.repeat(lambda: attack(attacker))) for _ in range(count)]
    print("attacking", flush=True)
    await ended.wait()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=5)
    print(json.dumps(attacker.ends), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
