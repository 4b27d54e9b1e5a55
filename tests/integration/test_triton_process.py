"""Triton's process: nothing is left when a part is killed, and it stops in time."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from deploy.triton.command import SHARED_MEMORY
from tests.support.triton_server import (
    ROOT,
    Chunk,
    RunningTriton,
    chat,
    running_triton,
    stream_chat,
)

pytestmark = pytest.mark.integration

END_SECONDS = 2.0
LONG = "Tell me a long story about a river and a mill."


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningTriton]:
    home: Path = tmp_path_factory.mktemp("triton")
    with running_triton(home, ["smollm2"]) as running:
        yield running


@pytest.fixture(autouse=True)
def _restarted(triton: RunningTriton) -> Iterator[None]:
    """Restarts what a test has killed."""
    yield
    if triton.process is None or triton.process.poll() is not None:
        triton.start()
        triton.load("smollm2")


def members(triton: RunningTriton) -> list[psutil.Process]:
    assert triton.process is not None
    found = psutil.Process(triton.process.pid).children(recursive=True)
    assert len(found) == 2, "a server and the process of one model"
    return found


def ended(processes: list[psutil.Process]) -> bool:
    """Returns whether all of them have ended within `END_SECONDS`."""
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        if not any(is_alive(process) for process in processes):
            return True
        time.sleep(0.02)
    return False


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_killed_server_ends_its_models_and_its_parent(triton):
    """The supervisor notices at once, and nothing is left in memory."""
    server, stub = members(triton)
    server.kill()
    assert triton.process.wait(END_SECONDS) != 0
    assert ended([server, stub])


def test_a_killed_parent_leaves_nothing(triton):
    """Server and models end when the process that the supervisor started is killed."""
    before = members(triton)
    triton.kill()
    assert ended(before)


def test_a_killed_supervisor_leaves_nothing(triton):
    """The kernel kills its descendants, one after the other."""
    triton.kill()
    supervisor = subprocess.Popen(
        [sys.executable, "-c", _SUPERVISOR, *triton.argv()], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    try:
        triton.wait_serving()
        triton.load("smollm2")
        before = psutil.Process(supervisor.pid).children(recursive=True)
        assert len(before) == 3
    finally:
        supervisor.kill()
        supervisor.wait()
    assert ended(before)


def test_it_serves_again_within_ten_seconds(triton):
    """From the kill to an answer, with the restart and the load of the model."""
    start = time.monotonic()
    triton.kill()
    triton.start()
    triton.load("smollm2")
    asyncio.run(_one_token(triton))
    assert time.monotonic() - start < 10


def test_it_removes_the_shared_memory_of_a_killed_triton(triton):
    """A killed Triton cannot clean up; the next one does."""
    before = set(SHARED_MEMORY.glob(f"{triton.region_prefix()}*"))
    assert before
    triton.kill()
    triton.start()
    assert not before & set(SHARED_MEMORY.glob(f"{triton.region_prefix()}*"))
    triton.load("smollm2")


async def test_a_crashed_model_ends_its_running_streams(triton):
    """Triton alone would never end them and would report the model as ready."""
    _, stub = members(triton)
    async with grpc.aio.insecure_channel(triton.address) as channel:
        stream = stream_chat(channel, LONG, max_tokens=900)
        await anext(stream)
        stub.kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(_drain(stream), END_SECONDS)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert triton.process.wait(END_SECONDS) != 0


async def test_a_failed_load_or_an_unload_does_not_affect_other_models(triton):
    """Neither counts as a crash."""
    triton.write_model("broken", "import os\nos.abort()\n")
    with pytest.raises(grpc.RpcError, match="not healthy"):
        triton.load("broken")
    triton.link_model("minilm")
    triton.load("minilm")
    triton.unload("minilm")
    await asyncio.sleep(2)
    async with grpc.aio.insecure_channel(triton.address) as channel:
        assert (await chat(channel, "Hi", max_tokens=2)).text
    assert triton.process.poll() is None


def test_it_stops_in_time_with_a_stream_running(triton):
    """SIGTERM ends all processes within a few seconds."""
    before = members(triton)
    start = time.monotonic()
    asyncio.run(_terminate_in_mid_stream(triton))
    assert time.monotonic() - start < 6
    assert ended(before)


async def _drain(stream: AsyncIterator[Chunk]) -> None:
    async for _ in stream:
        pass


async def _one_token(triton: RunningTriton) -> None:
    async with grpc.aio.insecure_channel(triton.address) as channel:
        assert (await chat(channel, "Hi", max_tokens=1)).text


async def _terminate_in_mid_stream(triton: RunningTriton) -> None:
    async with grpc.aio.insecure_channel(triton.address) as channel:
        stream = stream_chat(channel, LONG, max_tokens=900)
        await anext(stream)
        await asyncio.to_thread(triton.kill, signal.SIGTERM)
        await stream.aclose()


_SUPERVISOR = "import subprocess, sys; subprocess.run(sys.argv[1:])"
