"""The embedding model on a real Triton."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.support.triton_server import RunningTriton, infer_request, running_triton

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningTriton]:
    home: Path = tmp_path_factory.mktemp("triton")
    with running_triton(home, ["minilm"]) as running:
        yield running


@pytest.fixture
async def stub(triton: RunningTriton) -> AsyncIterator[service_pb2_grpc.GRPCInferenceServiceStub]:
    async with grpc.aio.insecure_channel(triton.address) as opened:
        yield service_pb2_grpc.GRPCInferenceServiceStub(opened)


async def embed(stub, *texts: str | bytes) -> tuple[np.ndarray, list[int]]:
    values = [text if isinstance(text, bytes) else text.encode() for text in texts]
    response = await stub.ModelInfer(infer_request("minilm", "text", values, [len(values), 1]))
    raw = {
        output.name: content
        for output, content in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    vectors = np.frombuffer(raw["embedding"], np.float32).reshape(len(texts), 384)
    return vectors, np.frombuffer(raw["token_count"], np.int32).tolist()


async def test_vectors_have_unit_length(stub):
    """Their dot product is their cosine."""
    vectors, _ = await embed(stub, "A short text.", "", "Another, somewhat longer text; 🌊!")
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


async def test_alike_texts_are_closer_than_others(stub):
    """The vectors mean something."""
    vectors, _ = await embed(
        stub, "A man is playing a guitar.", "Someone plays an instrument.", "Taxes rose in May."
    )
    assert vectors[0] @ vectors[1] > 0.5
    assert vectors[0] @ vectors[2] < 0.2


async def test_a_vector_does_not_depend_on_its_batch(stub):
    """A cache may keep it: the same text alone and among longer ones."""
    alone, _ = await embed(stub, "The mill stands by the river.")
    among, _ = await embed(stub, "x " * 150, "The mill stands by the river.", "hi")
    assert np.allclose(alone[0], among[1], atol=1e-5)


async def test_tokens_are_counted_with_the_marks_at_both_ends(stub):
    """[CLS] hello world [SEP]."""
    _, counts = await embed(stub, "hello world", "")
    assert counts == [4, 2]


async def test_a_long_text_is_cut(stub):
    """What lies behind 256 tokens does not count."""
    vectors, counts = await embed(stub, "river " * 254, "river " * 254 + "and a mill")
    assert counts == [256, 256]
    assert np.allclose(vectors[0], vectors[1], atol=1e-6)


async def test_concurrent_requests_are_batched(triton, stub):
    """Many small requests run as few batches."""
    before = await _executions(stub, triton.control)
    await asyncio.gather(*(embed(stub, f"text number {n}") for n in range(64)))
    counts = await _executions(stub, triton.control)
    requests, executions = (after - earlier for after, earlier in zip(counts, before, strict=True))
    assert requests == 64
    assert executions < 40


async def test_bytes_that_are_no_text_are_refused_alone(stub):
    """The error says what is wrong."""
    with pytest.raises(grpc.aio.AioRpcError, match="INVALID_FIELD"):
        await embed(stub, b"\xff\xfe")


async def test_a_batch_of_the_largest_size_is_taken(stub):
    """64 texts in one request."""
    vectors, counts = await embed(stub, *(f"text {n}" for n in range(64)))
    assert vectors.shape == (64, 384)
    assert len(counts) == 64


async def _executions(stub, control) -> tuple[int, int]:
    """Returns the counts once they stand still: Triton counts a request after it has answered."""
    request = service_pb2.ModelStatisticsRequest(name="minilm")
    seen = (-1, -1)
    async with asyncio.timeout(10):
        while True:
            statistics = (await stub.ModelStatistics(request, metadata=control)).model_stats[0]
            counts = (statistics.inference_count, statistics.execution_count)
            if counts == seen:
                return counts
            seen = counts
            await asyncio.sleep(0.2)
