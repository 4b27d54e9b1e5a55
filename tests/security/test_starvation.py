"""One tenant works against all others, through a real mesh: they are still served.

What a victim sees is compared with what it sees on a quiet mesh. The machine of the tests is noisy
and slow, so a victim may also take a fixed time, which is far below what it took without a defence.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator

import grpc
import psutil
import pytest
from headrace.embedding.v1 import embedding_pb2, embedding_pb2_grpc
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc

from libs.chat.wire import text_message
from tests.support.attacks import MEBIBYTE, attacking
from tests.support.mesh import RunningMesh, running_mesh

pytestmark = [pytest.mark.integration, pytest.mark.storm]

VICTIM, ATTACKER = "acme", "evil"
# A victim's 99th percentile may be twice the quiet one, or this, whichever is longer.
RATIO = 2.0
# Before: 70 s. A text that the model embeds now takes up to 0.15 s there, and is not interrupted.
EMBEDDING_FLOOR_SECONDS = 1.5
# Before: refused.
CHAT_FLOOR_SECONDS = 4.0

# Before: 4.5 s. The two cores of the tests copy up to 480 MiB at the same time.
TENSOR_FLOOR_SECONDS = 4.0
# Before: 2,100 MiB, and more with each call.
GROWTH_LIMIT_MEBIBYTES = 512

_numbers = itertools.count()


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    with running_mesh(tmp_path_factory.mktemp("m"), models=True) as mesh:
        yield mesh


async def embed(mesh: RunningMesh, channel: grpc.aio.Channel) -> None:
    """Embeds a short text that nobody has embedded."""
    stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
    text = f"The mill stands at river number {next(_numbers)} {uuid.uuid4()}"
    request = embedding_pb2.EmbedRequest(model="minilm", texts=[text])
    await stub.Embed(request, metadata=mesh.metadata(tenant=VICTIM), timeout=60)


async def first_token(mesh: RunningMesh, channel: grpc.aio.Channel) -> None:
    """Returns when the first token of an answer has arrived."""
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    message = text_message(inference_pb2.ROLE_USER, f"Say {next(_numbers)}")
    request = inference_pb2.GenerateRequest(model="smollm2", max_tokens=4, messages=[message])
    call = stub.Generate(request, metadata=mesh.metadata(tenant=VICTIM), timeout=60)
    async for response in call:
        if response.HasField("delta"):
            break
    call.cancel()


async def p99(work: Callable[[], Awaitable[None]], *, count: int, seconds: float) -> float:
    """Returns the 99th percentile of the durations of calls, one after the other."""
    durations: list[float] = []
    end = time.perf_counter() + seconds
    while len(durations) < count and (len(durations) < 5 or time.perf_counter() < end):
        started = time.perf_counter()
        await work()
        durations.append(time.perf_counter() - started)
    ordered = sorted(durations)
    print(
        f"{len(ordered)} calls: median {ordered[len(ordered) // 2]:.3f} s, "
        f"slowest {' '.join(f'{each:.3f}' for each in ordered[-4:])} s"
    )
    return ordered[int(0.99 * (len(ordered) - 1) + 0.5)]


async def test_many_long_texts_do_not_stop_those_of_others(mesh: RunningMesh) -> None:
    """Three requests of 2,048 texts at a time, each of which keeps the model busy for a minute."""
    async with mesh.channel() as channel:

        async def victim() -> None:
            await embed(mesh, channel)

        await p99(victim, count=10, seconds=5)
        quiet = await p99(victim, count=60, seconds=5)
        token = mesh.token(tenant=ATTACKER)
        async with attacking("many_texts", address=mesh.address, token=token) as ends:
            attacked = await p99(victim, count=100, seconds=15)
    print(ends)
    assert set(ends) <= {"200"}
    assert attacked <= max(RATIO * quiet, EMBEDDING_FLOOR_SECONDS)


async def test_urgent_calls_do_not_refuse_those_of_others(mesh: RunningMesh) -> None:
    """300 calls of the highest priority at a time: the victim starts at once, if not as fast."""
    async with mesh.channel() as channel:

        async def victim() -> None:
            await first_token(mesh, channel)

        await p99(victim, count=3, seconds=5)
        quiet = await p99(victim, count=20, seconds=8)
        token = mesh.token(tenant=ATTACKER, max_priority=9)
        async with attacking("urgent_chat", address=mesh.address, token=token) as ends:
            attacked = await p99(victim, count=20, seconds=20)
    print(ends)
    assert ends["messages"] > 100
    assert attacked <= max(RATIO * quiet, CHAT_FLOOR_SECONDS)


@pytest.mark.parametrize("attack", ["large_tensors", "large_streams", "many_streams"])
async def test_large_tensors_do_not_fill_the_memory(mesh: RunningMesh, attack: str) -> None:
    """Tensors that the model does not even have.

    Eight calls, or streams, with 60 MiB each, or a hundred streams with 8 MiB each.
    """
    inference = psutil.Process(mesh.pid("inference"))
    before = most = inference.memory_info().rss
    async with mesh.channel() as channel:

        async def victim() -> None:
            nonlocal most
            await embed(mesh, channel)
            most = max(most, inference.memory_info().rss)

        quiet = await p99(victim, count=60, seconds=5)
        token = mesh.token(tenant=ATTACKER)
        async with attacking(attack, address=mesh.address, token=token) as ends:
            attacked = await p99(victim, count=150, seconds=10)
    grown = (most - before) // MEBIBYTE
    print(ends, f"{grown} MiB more")
    assert attacked <= max(RATIO * quiet, TENSOR_FLOOR_SECONDS)
    assert grown < GROWTH_LIMIT_MEBIBYTES
