"""Steady load with cancellations and kills: memory, files and tasks must not grow.

Runs for `HEADRACE_SOAK_MINUTES` (30). A line is fitted to the memory after the first fifth, which
is the warm-up.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

import aiohttp
import grpc
import numpy as np
import psutil
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc

from deploy.local.ports import read_ports
from libs.chat.wire import text_message
from tests.bench.chaos_streams import QUESTIONS, answer
from tests.bench.report import Report
from tests.support.mesh import RunningMesh, running_mesh

DEFAULT_MINUTES = 30.0
SAMPLE_SECONDS = 5.0
KILL_SECONDS = 60.0
# Concurrent streams that use about 70 % of the throughput of SmolLM2 on one core.
STREAMS = 3
MAX_TOKENS = 48
CANCEL_EACH = 4

# One of the streams uses HTTP, so that both APIs of inference have load.
HTTP_STREAM = 0
TASKS = "headrace_process_tasks"

# Time, resident bytes, open files, asyncio tasks.
Samples = dict[str, list[tuple[float, float, int, int]]]


def run(report: Report) -> None:
    """Measures a mesh with one Triton and one inference replica."""
    minutes = float(os.environ.get("HEADRACE_SOAK_MINUTES") or DEFAULT_MINUTES)
    with tempfile.TemporaryDirectory() as home, running_mesh(Path(home), models=True) as mesh:
        asyncio.run(_soak(mesh, report, 60 * minutes))


async def _soak(mesh: RunningMesh, report: Report, seconds: float) -> None:
    samples: Samples = defaultdict(list)
    end = time.monotonic() + seconds
    async with mesh.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        killing = asyncio.create_task(_kill(mesh))
        load = [
            asyncio.create_task(
                _load_http(mesh, end) if index == HTTP_STREAM else _load(mesh, stub, end, index)
            )
            for index in range(STREAMS)
        ]
        while time.monotonic() < end:
            await _sample(mesh, samples)
            await asyncio.sleep(SAMPLE_SECONDS)
        killing.cancel()
        answered = sum(await asyncio.gather(*load))
    conditions = (
        f"{seconds / 60:g} min, {STREAMS} streams at once, each {CANCEL_EACH}th cancelled, Triton "
        f"killed each {KILL_SECONDS:g} s, {answered} answers"
    )
    for name, taken in sorted(samples.items()):
        settled = taken[len(taken) // 5 :]
        times, sizes, files, tasks = (np.array(each) for each in zip(*settled, strict=True))
        slope = np.polyfit(times, sizes, 1)[0] * 600 / 2**20
        report.add(f"soak.{name}.rss_mb_per_10min", float(slope), "MB", conditions)
        # Medians of the first and the last tenth, because single samples vary with the load.
        tenth = max(1, len(settled) // 10)
        for what, column in (("files", files), ("tasks", tasks)):
            growth = float(np.median(column[-tenth:]) - np.median(column[:tenth]))
            report.add(f"soak.{name}.{what}_growth", growth, what, conditions)


async def _sample(mesh: RunningMesh, samples: Samples) -> None:
    now = time.monotonic()
    ports = read_ports(mesh.layout)
    for process in mesh.processes:
        if process.group != "services":
            continue
        watched = psutil.Process(mesh.pid(process.name))
        tasks = await asyncio.to_thread(_tasks, ports[f"{process.name}.metrics"])
        samples[process.name].append((now, watched.memory_info().rss, watched.num_fds(), tasks))


def _tasks(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        lines = response.read().decode().splitlines()
    return next(int(float(line.split()[1])) for line in lines if line.startswith(TASKS))


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
        messages=[text_message(inference_pb2.ROLE_USER, question)],
        max_tokens=MAX_TOKENS,
    )
    call = stub.Generate(request, metadata=mesh.metadata())
    try:
        async for _ in call:
            break
    except grpc.aio.AioRpcError:
        return  # Triton was just killed, before the first token
    call.cancel()


async def _load_http(mesh: RunningMesh, end: float) -> int:
    count = 0
    async with aiohttp.ClientSession() as http:
        while time.monotonic() < end:
            count += 1
            body = {
                "model": "smollm2",
                "messages": [{"role": "user", "content": QUESTIONS[count % len(QUESTIONS)]}],
                "max_tokens": MAX_TOKENS,
                "stream": True,
            }
            async with http.post(
                f"{mesh.url}/v1/chat/completions",
                json=body,
                headers={"authorization": f"Bearer {mesh.token()}"},
            ) as response:
                if count % CANCEL_EACH:
                    text = await response.text()
                    assert "[DONE]" in text, text[-300:]
                else:
                    await response.content.readany()
                    response.close()
    return count


async def _kill(mesh: RunningMesh) -> None:
    while True:
        await asyncio.sleep(KILL_SECONDS)
        os.kill(mesh.pid("triton-0"), signal.SIGKILL)
