"""Small requests that would take much memory or time, while others use the mesh."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import grpc
import psutil
import pytest

from deploy.local.supervisor import process_states
from tests.support.fuzzing import ALL_SCOPES
from tests.support.mesh import RunningMesh

pytestmark = pytest.mark.integration

MIB = 1024 * 1024
# Each of 64 KiB, and of 64 MiB when it is decompressed.
ZIPPED_CALLS = 64
MAX_GROWTH_MIB = 48
ATTACK_SECONDS = 8.0
QUIET_SECONDS = 4.0
PAUSE_SECONDS = 0.02
# On two cores, which the test shares with the mesh, scheduling alone takes a part of this.
FLOOR_SECONDS = 0.25
_EMPTY_MESSAGES = b'{"model":"m","messages":[' + b"{}," * 1_390_000 + b"{}]}"
_EMPTY_PROTOS = b"\x1a\x00" * (2 * MIB - 16)
_CHAT = "/v1/chat/completions"
_GENERATE = "/headrace.inference.v1.InferenceService/Generate"


def resident_mib(mesh: RunningMesh) -> float:
    """Returns the memory of all services."""
    pids = [
        state.pid
        for name, state in process_states(mesh.layout).items()
        if not name.startswith(("triton", "nats"))
    ]
    return sum(psutil.Process(pid).memory_info().rss for pid in pids) / MIB


async def test_compressed_messages_without_a_token_take_no_memory(bare_mesh):
    """Sixty-four of them took two services to 390 MiB."""
    message = bytes(64 * MIB)
    methods = (
        ("/grpc.health.v1.Health/Check", "unary_unary"),
        ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "stream_stream"),
    )
    before = resident_mib(bare_mesh)
    highest = before
    async with bare_mesh.channel() as channel:
        opened: Any = channel
        for path, kind in methods:
            for _ in range(ZIPPED_CALLS // len(methods)):
                method = getattr(opened, kind)(path)
                request = iter([message]) if kind.startswith("stream") else message
                call = method(request, compression=grpc.Compression.Gzip, timeout=10)
                assert await call.code() in (
                    grpc.StatusCode.UNIMPLEMENTED,
                    grpc.StatusCode.INVALID_ARGUMENT,
                    grpc.StatusCode.RESOURCE_EXHAUSTED,  # the limit of calls without a token
                    grpc.StatusCode.INTERNAL,  # gRPC's own, where the call ended while it sent
                )
                highest = max(highest, resident_mib(bare_mesh))
    assert highest - before < MAX_GROWTH_MIB


class Victim:
    """A caller with small requests."""

    def __init__(self, http: aiohttp.ClientSession, headers: dict[str, str]) -> None:
        self._http = http
        self._headers = headers

    async def latencies(self, seconds: float) -> list[float]:
        """Sends requests for a while; returns how long each took, sorted."""
        taken = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            began = time.perf_counter()
            async with self._http.get("/v1/models", headers=self._headers) as response:
                assert response.status == 200
            taken.append(time.perf_counter() - began)
            await asyncio.sleep(PAUSE_SECONDS)
        return sorted(taken)


def p99(latencies: list[float]) -> float:
    return latencies[int(len(latencies) * 0.99)]


async def attack(send: Callable[[], Awaitable[object]]) -> None:
    while True:
        await send()


@pytest.mark.parametrize("kind", ["json", "protobuf"])
async def test_a_million_empty_messages_do_not_hold_up_others(bare_mesh, kind):
    """They held up the event loop for 2.25 s."""
    headers = {"authorization": f"Bearer {bare_mesh.token(scopes=ALL_SCOPES)}"}
    metadata = bare_mesh.metadata(scopes=ALL_SCOPES)
    answers: list[object] = []
    async with (
        aiohttp.ClientSession(bare_mesh.url) as http,
        bare_mesh.channel() as channel,
    ):
        opened: Any = channel

        async def send_json() -> None:
            async with http.post(
                _CHAT, data=io.BytesIO(_EMPTY_MESSAGES), headers=headers
            ) as response:
                await response.read()
                answers.append(response.status)

        async def send_protobuf() -> None:
            call = opened.unary_stream(_GENERATE)(_EMPTY_PROTOS, metadata=metadata)
            answers.append((await call.code()).name)

        victim = Victim(http, headers)
        await victim.latencies(0.5)
        quiet = p99(await victim.latencies(QUIET_SECONDS))
        attacking = asyncio.create_task(attack(send_json if kind == "json" else send_protobuf))
        hurt = await victim.latencies(ATTACK_SECONDS)
        attacking.cancel()
        await asyncio.wait([attacking])
    print(f"{kind}: quiet {quiet:.3f} s, attacked {p99(hurt):.3f} s, {len(answers)} requests")
    assert set(answers) <= {400, 429, "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}
    assert len(answers) > 3
    assert p99(hurt) < max(2 * quiet, FLOOR_SECONDS)
