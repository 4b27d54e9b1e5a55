"""A process that stalls after its first message, so that a test can kill it there."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from headrace.inference.v1 import inference_pb2

from tests.support.scripted import BodyPart, ScriptedMesh

_ADDRESSES = "addresses: "


@asynccontextmanager
async def stalling_service() -> AsyncIterator[tuple[asyncio.subprocess.Process, str, str]]:
    """Runs this module; yields the process and the `host:port` of inference and of control."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.stalling_service", stdout=asyncio.subprocess.PIPE
    )
    try:
        line = ""
        while not line.startswith(_ADDRESSES):
            assert process.stdout is not None
            line = (await process.stdout.readline()).decode()
            assert line, "the service ended before it listened"
        inference, control = line.removeprefix(_ADDRESSES).split()
        yield process, inference, control
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _generate(_request: Any, _context: Any) -> AsyncIterator[Any]:
    yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text="a"))
    await asyncio.Event().wait()


async def _chat(_body: bytes) -> AsyncIterator[BodyPart]:
    yield BodyPart(b"data: 1\n\n")
    await asyncio.Event().wait()


async def _watch() -> AsyncIterator[str]:
    yield "a"
    await asyncio.Event().wait()


async def _main() -> None:
    mesh = ScriptedMesh()
    mesh.inference.generate = _generate
    mesh.chat.answer = _chat
    mesh.jobs.watch = _watch
    async with mesh.serving_inference() as inference, mesh.serving_control() as control:
        print(f"{_ADDRESSES}{inference} {control}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main())
