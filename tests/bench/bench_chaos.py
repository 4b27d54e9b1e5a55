"""Greedy streams while Tritons and inference replicas are killed with -9: what clients get."""

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
from tests.bench.chaos_streams import QUESTIONS, Seen, answer
from tests.bench.report import Report
from tests.support.mesh import RunningMesh, running_mesh

STREAMS = 200
MAX_TOKENS = 24
KILL_SECONDS = 5.0
VICTIMS = ("triton-0", "inference", "triton-1", "inference-1")


def run(report: Report) -> None:
    """Measures with two Tritons and two inference replicas."""
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
        undisturbed = {seen.question: seen for seen in await _ask(mesh, stub, QUESTIONS)}
        kills: Counter[str] = Counter()
        killing = asyncio.create_task(_kill(mesh, kills))
        started = time.perf_counter()
        wanted = [QUESTIONS[index % len(QUESTIONS)] for index in range(STREAMS)]
        answers = await _ask(mesh, stub, wanted)
        seconds = time.perf_counter() - started
        killing.cancel()
    ended = [seen for seen in answers if seen.final is not None]
    same = [seen for seen in ended if seen.text == undisturbed[seen.question].text]
    miscounted = [seen for seen in ended if seen.token_count != MAX_TOKENS and seen not in same]
    conditions = (
        f"{STREAMS} greedy streams of {MAX_TOKENS} tokens, a kill -9 every {KILL_SECONDS:.0f} s "
        f"({sum(kills.values())} in {seconds:.0f} s), 2 Tritons, 2 inference replicas, clients "
        "continue with resume_from"
    )
    report.add("chaos.streams.ended", len(ended), "streams", conditions)
    report.add("chaos.streams.same_text_share", len(same) / STREAMS, "ratio", conditions)
    report.add("chaos.streams.tokens_off", len(miscounted), "streams", conditions)
    report.add("chaos.resumed", sum(seen.resumed for seen in answers), "resumes", conditions)
    report.add("chaos.client_retries", sum(seen.breaks for seen in answers), "tries", conditions)


async def _ask(
    mesh: RunningMesh, stub: inference_pb2_grpc.InferenceServiceAsyncStub, questions: list[str]
) -> list[Seen]:
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
