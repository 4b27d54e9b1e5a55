"""Time to start a mesh, its idle memory, and time to the first token."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import psutil
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc

from deploy.local.layout import Layout
from deploy.local.lifecycle import deploy_models, start, stop
from libs.chat.wire import text_message
from tests.bench.report import Report
from tests.support.mesh import RunningMesh, SilentProgress, free_port

IDLE_SECONDS = 10
FIRST_TOKENS = 11


def run(report: Report) -> None:
    """Starts a mesh twice; the second start finds the models in place, as for a user."""
    with tempfile.TemporaryDirectory() as home:
        layout = Layout(home=Path(home), edge_port=free_port())
        try:
            _start(layout)
            stop(layout)
            mesh, seconds = _start(layout)
            report.add("start.warm_s", seconds, "s", "until both models answer through the edge")
            time.sleep(IDLE_SECONDS)
            services = [process for process in mesh.processes if process.group == "services"]
            resident = sum(
                psutil.Process(mesh.pid(process.name)).memory_info().rss for process in services
            )
            report.add(
                "start.memory_mb",
                resident / 1e6,
                "MB",
                f"resident, idle, the {len(services)} Python services together",
            )
            report.add(
                "start.first_token_ms",
                asyncio.run(_first_token_ms(mesh)),
                "ms",
                f"median of {FIRST_TOKENS} short prompts, one at a time, through the edge",
            )
        finally:
            stop(layout)


def _start(layout: Layout) -> tuple[RunningMesh, float]:
    started = time.perf_counter()
    processes = start(layout, SilentProgress())
    deploy_models(layout, SilentProgress())
    seconds = time.perf_counter() - started
    return RunningMesh(layout=layout, processes=processes), seconds


async def _first_token_ms(mesh: RunningMesh) -> float:
    times = []
    async with mesh.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for number in range(FIRST_TOKENS):
            request = inference_pb2.GenerateRequest(
                model="smollm2",
                messages=[text_message(inference_pb2.ROLE_USER, f"What is {number}?")],
                max_tokens=4,
            )
            started = time.perf_counter()
            arrived = None
            async for response in stub.Generate(request, metadata=mesh.metadata()):
                if response.HasField("delta"):
                    arrived = arrived or time.perf_counter()
            assert arrived is not None
            times.append(1000 * (arrived - started))
    return statistics.median(times)
