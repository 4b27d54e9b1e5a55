"""What clients receive while Tritons and inference replicas are killed with SIGKILL."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from headrace.inference.v1 import inference_pb2_grpc

from deploy.local.supervisor import process_states
from tests.bench.chaos_streams import QUESTIONS, StreamResult, answer
from tests.bench.report import Report
from tests.support.mesh import RunningMesh, running_mesh

STREAMS = 200
MAX_TOKENS = 24
KILL_SECONDS = 5.0
VICTIMS = ("triton-0", "inference", "triton-1", "inference-1")


def run(report: Report) -> None:
    """Measures a mesh with two Tritons and two inference replicas."""
    with (
        tempfile.TemporaryDirectory() as home,
        pytest.MonkeyPatch.context() as environment,
    ):
        environment.setenv("HEADRACE_LOG_LEVEL", "warning")
        with running_mesh(Path(home), models=True, inference_replicas=2, triton_backends=2) as mesh:
            asyncio.run(_measure(mesh, report))


async def _measure(mesh: RunningMesh, report: Report) -> None:
    async with mesh.channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        undisturbed = {result.question: result for result in await _ask(mesh, stub, QUESTIONS)}
        kills: Counter[str] = Counter()
        killing = asyncio.create_task(_kill(mesh, kills))
        started = time.perf_counter()
        questions = [QUESTIONS[index % len(QUESTIONS)] for index in range(STREAMS)]
        answers = await _ask(mesh, stub, questions)
        seconds = time.perf_counter() - started
        killing.cancel()
    ended = [result for result in answers if result.final is not None]
    same = [result for result in ended if result.text == undisturbed[result.question].text]
    miscounted = [
        result for result in ended if result.token_count != MAX_TOKENS and result not in same
    ]
    conditions = (
        f"{STREAMS} greedy streams of {MAX_TOKENS} tokens, a kill -9 every {KILL_SECONDS:.0f} s "
        f"({sum(kills.values())} in {seconds:.0f} s), 2 Tritons, 2 inference replicas, clients "
        "continue with resume_from"
    )
    report.add("chaos.streams.ended", len(ended), "streams", conditions)
    report.add("chaos.streams.same_text_share", len(same) / STREAMS, "ratio", conditions)
    report.add("chaos.streams.tokens_off", len(miscounted), "streams", conditions)
    report.add("chaos.resumed", sum(result.resumed for result in answers), "resumes", conditions)
    report.add(
        "chaos.client_retries", sum(result.breaks for result in answers), "tries", conditions
    )


async def _ask(
    mesh: RunningMesh, stub: inference_pb2_grpc.InferenceServiceAsyncStub, questions: list[str]
) -> list[StreamResult]:
    metadata = mesh.metadata()
    return await asyncio.gather(
        *(answer(stub, text, metadata=metadata, max_tokens=MAX_TOKENS) for text in questions)
    )


async def _kill(mesh: RunningMesh, kills: Counter[str]) -> None:
    while True:
        for victim in VICTIMS:
            await asyncio.sleep(KILL_SECONDS)
            states = await asyncio.to_thread(process_states, mesh.layout)
            if states[victim].pid:
                os.kill(states[victim].pid, signal.SIGKILL)
                kills[victim] += 1
