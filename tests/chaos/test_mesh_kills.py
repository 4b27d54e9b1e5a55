"""Any process may be killed at any moment; the mesh recovers without intervention."""

from __future__ import annotations

import time

import grpc
import pytest
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc

from libs.chat.wire import text_message
from tests.bench.chaos_streams import answer
from tests.support.mesh import RunningMesh

pytestmark = pytest.mark.chaos

RECOVERY_SECONDS = 10.0
PROCESSES = (
    "nats", "triton-0", "envoy", "registry", "router", "inference", "embedding_cache", "cost",
    "jobs", "worker", "pool_agent",
)  # fmt: skip


@pytest.mark.parametrize("name", PROCESSES)
async def test_the_mesh_recovers_from_a_killed_process(mesh: RunningMesh, name: str):
    """Within ten seconds it answers, and the killed process is ready again."""
    before = mesh.pid(name)
    mesh.kill(name)
    deadline = time.monotonic() + RECOVERY_SECONDS
    while not await serves(mesh) or mesh.pid(name) in (0, before):
        assert time.monotonic() < deadline, (
            f"no answer {RECOVERY_SECONDS:g} s after {name} was killed"
        )
    mesh.await_ready(name, seconds=max(1.0, deadline - time.monotonic()))


async def test_a_stream_continues_when_its_triton_is_killed(mesh: RunningMesh):
    """The text is complete, the answer says resumed, and tokens computed twice are billed once."""
    question = "Tell me a story about the sea."
    async with mesh.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        undisturbed = await answer(stub, question, metadata=mesh.metadata(), max_tokens=48)
        request = inference_pb2.GenerateRequest(
            model="smollm2",
            messages=[text_message(inference_pb2.ROLE_USER, question)],
            max_tokens=48,
        )
        text, count, final = "", 0, None
        async for response in stub.Generate(request, metadata=mesh.metadata()):
            if response.HasField("final"):
                final = response.final
                continue
            text += response.delta.text
            if count < 8 <= count + response.delta.token_count:
                mesh.kill("triton-0")
            count += response.delta.token_count
    assert text == undisturbed.text
    assert final is not None
    assert undisturbed.final is not None
    assert final.resumed_count == 1
    assert final.recomputed_tokens > 0
    assert final.usage.completion_tokens == undisturbed.final.usage.completion_tokens


async def serves(mesh: RunningMesh) -> bool:
    request = inference_pb2.GenerateRequest(
        model="smollm2",
        messages=[text_message(inference_pb2.ROLE_USER, "Hello")],
        max_tokens=1,
    )
    async with mesh.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        try:
            async for _ in stub.Generate(request, metadata=mesh.metadata(), timeout=5):
                pass
        except grpc.aio.AioRpcError:
            return False
    return True
