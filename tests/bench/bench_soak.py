"""Hours in minutes: steady load with cancels and kills; nothing may grow.

Runs `HEADRACE_SOAK_MINUTES` (30). Memory is fitted by a line after the first fifth, which warms up.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import grpc
import numpy as np
import psutil
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc

from tests.bench.chaos_streams import QUESTIONS, answer
from tests.bench.report import Report
from tests.support.mesh import RunningMesh, running_mesh

DEFAULT_MINUTES = 30.0
SAMPLE_SECONDS = 5.0
KILL_SECONDS = 60.0
# About seven tenths of what SmolLM2 on one core of this kind gives, in streams that run at once.
STREAMS = 3
MAX_TOKENS = 48
CANCEL_EACH = 4

Samples = dict[str, list[tuple[float, float, int]]]


def run(report: Report) -> None:
    """Soaks a mesh of one Triton and one inference replica."""
    minutes = float(os.environ.get("HEADRACE_SOAK_MINUTES") or DEFAULT_MINUTES)
    with tempfile.TemporaryDirectory() as home, running_mesh(Path(home), models=True) as mesh:
        asyncio.run(_soak(mesh, report, 60 * minutes))


async def _soak(mesh: RunningMesh, report: Report, seconds: float) -> None:
    samples: Samples = defaultdict(list)
    end = time.monotonic() + seconds
    async with mesh.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        killing = asyncio.create_task(_kill(mesh))
        load = [asyncio.create_task(_load(mesh, stub, end, index)) for index in range(STREAMS)]
        while time.monotonic() < end:
            _sample(mesh, samples)
            await asyncio.sleep(SAMPLE_SECONDS)
        killing.cancel()
        answered = sum(await asyncio.gather(*load))
    conditions = (
        f"{seconds / 60:g} min, {STREAMS} streams at once, each {CANCEL_EACH}th cancelled, Triton "
        f"killed each {KILL_SECONDS:g} s, {answered} answers"
    )
    for name, taken in sorted(samples.items()):
        settled = taken[len(taken) // 5 :]
        times, sizes, files = (np.array(column) for column in zip(*settled, strict=True))
        slope = np.polyfit(times, sizes, 1)[0] * 600 / 2**20
        report.add(f"soak.{name}.rss_mb_per_10min", float(slope), "MB", conditions)
        report.add(f"soak.{name}.files_grown", float(files[-1] - files[0]), "files", conditions)


def _sample(mesh: RunningMesh, samples: Samples) -> None:
    now = time.monotonic()
    for process in mesh.processes:
        if process.group != "services":
            continue
        watched = psutil.Process(mesh.pid(process.name))
        samples[process.name].append((now, watched.memory_info().rss, watched.num_fds()))


async def _load(
    mesh: RunningMesh,
    stub: inference_pb2_grpc.InferenceServiceAsyncStub,
    end: float,
    index: int,
) -> int:
    count = 0
    while time.monotonic() < end:
        count += 1
        question = QUESTIONS[(index + count) % len(QUESTIONS)]
        if count % CANCEL_EACH:
            await answer(stub, question, metadata=mesh.metadata(), max_tokens=MAX_TOKENS)
        else:
            await _give_up(mesh, stub, question)
    return count


async def _give_up(
    mesh: RunningMesh, stub: inference_pb2_grpc.InferenceServiceAsyncStub, question: str
) -> None:
    request = inference_pb2.GenerateRequest(
        model="smollm2",
        messages=[inference_pb2.Message(role="user", content=question)],
        max_tokens=MAX_TOKENS,
    )
    call = stub.Generate(request, metadata=mesh.metadata())
    try:
        async for _ in call:
            break
    except grpc.aio.AioRpcError:
        return  # Triton was just killed, before the first token
    call.cancel()


async def _kill(mesh: RunningMesh) -> None:
    while True:
        await asyncio.sleep(KILL_SECONDS)
        os.kill(mesh.pid("triton-0"), signal.SIGKILL)
