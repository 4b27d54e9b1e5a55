"""Opens and cancels many streams; afterwards nothing may be left of them."""

from __future__ import annotations

import asyncio
import tempfile
import time
import urllib.request
from pathlib import Path

import grpc
import psutil
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc

from deploy.local.ports import read_ports
from libs.chat.wire import text_message
from tests.bench.report import Report
from tests.support.mesh import RunningMesh, running_mesh

STORMS = 10
STREAMS = 500
STORM_SECONDS = 2.0
# The edge keeps idle connections to a service for a minute.
POOLED_SECONDS = 75
SETTLE_SECONDS = 20.0
LIVE = "headrace_inference_live_streams"
WAITING = "headrace_inference_waiting_requests"


def run(report: Report) -> None:
    """Measures a mesh with one Triton and one inference replica."""
    with tempfile.TemporaryDirectory() as home, running_mesh(Path(home), models=True) as mesh:
        asyncio.run(_measure(mesh, report))


async def _measure(mesh: RunningMesh, report: Report) -> None:
    pid = mesh.pid("inference")
    triton_pid = mesh.pid("triton-0")
    async with mesh.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        await _storm(mesh, stub)  # warms caches and pools
        await _settled(mesh)
        before = psutil.Process(pid).memory_info().rss
        files_before = psutil.Process(pid).num_fds()
        for _ in range(STORMS):
            await _storm(mesh, stub)
        settle_seconds = await _settled(mesh)
        started = time.perf_counter()
        async for response in stub.Generate(_request(4), metadata=mesh.metadata()):
            if response.HasField("delta"):
                break
        first_ms = 1000 * (time.perf_counter() - started)
    conditions = f"{STORMS} storms of {STREAMS} streams opened and cancelled in {STORM_SECONDS:g} s"
    growth = psutil.Process(pid).memory_info().rss - before
    report.add("cancel.memory_growth_mb", growth / 2**20, "MB", conditions)
    files_left = await _files_left(pid, files_before) - files_before
    report.add("cancel.files_growth", files_left, "files", conditions)
    report.add("cancel.settle_s", settle_seconds, "s", f"{conditions}; until no stream is left")
    report.add("cancel.next_first_token_ms", first_ms, "ms", "the first request after the storms")
    alive = float(mesh.pid("triton-0") == triton_pid)
    report.add("cancel.triton_alive", alive, "1 or 0", conditions)


async def _storm(mesh: RunningMesh, stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> None:
    metadata = mesh.metadata()

    async def give_up(index: int) -> None:
        await asyncio.sleep(index * STORM_SECONDS / STREAMS / 2)
        call = stub.Generate(_request(64), metadata=metadata)
        try:
            async with asyncio.timeout(STORM_SECONDS / 2):
                async for _ in call:
                    pass
        except (TimeoutError, grpc.aio.AioRpcError):
            call.cancel()

    await asyncio.gather(*(give_up(index) for index in range(STREAMS)))


async def _settled(mesh: RunningMesh) -> float:
    started = time.perf_counter()
    while _metric(mesh, LIVE) or _metric(mesh, WAITING):
        if time.perf_counter() - started > SETTLE_SECONDS:
            raise AssertionError(f"streams live {SETTLE_SECONDS:g} s after they were cancelled")
        await asyncio.sleep(0.05)
    return time.perf_counter() - started


async def _files_left(pid: int, before: int) -> int:
    """Returns the number of open files after the edge has closed its idle connections."""
    process = psutil.Process(pid)
    for _ in range(POOLED_SECONDS):
        if process.num_fds() <= before:
            break
        await asyncio.sleep(1)
    return process.num_fds()


def _metric(mesh: RunningMesh, name: str) -> float:
    url = f"http://127.0.0.1:{read_ports(mesh.layout)['inference.metrics']}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def _request(max_tokens: int) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        model="smollm2",
        messages=[text_message(inference_pb2.ROLE_USER, "Tell me a long story.")],
        max_tokens=max_tokens,
    )
