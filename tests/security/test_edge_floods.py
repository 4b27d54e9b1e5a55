"""Floods that one caller sends: others are answered as before, and the edge's memory is bounded."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc
from headrace.jobs.v1 import jobs_pb2, jobs_pb2_grpc

from deploy.envoy.limits import MAX_OPEN_BODY_BYTES, MIB, Limits
from libs.openai.bodies import CHAT_COMPLETIONS_PATH
from tests.support.http2_flood import Attacker, attackers, until_running
from tests.support.rpc import reason_of
from tests.support.scripted import GENERATE_PATH, ScriptedMesh, scripted_mesh

pytestmark = pytest.mark.integration

_WATCH = "/grpc.health.v1.Health/Watch"
_OPEN = Limits(open_requests_per_second=100_000)
# Short, so that the tests are.
_BODIES = Limits(body_idle_seconds=2, body_seconds=4)
# Bodies that never time out while a test runs.
_PATIENT = Limits(body_idle_seconds=60)
_VICTIM_CALLS = 60
# The quiet p99 is one or two milliseconds: a busy machine adds as much by itself.
_NOISE_SECONDS = 0.05


async def _chat(mesh: ScriptedMesh) -> None:
    headers = mesh.edge.bearer(tenant="victim")
    async with mesh.http.post(CHAT_COMPLETIONS_PATH, json={}, headers=headers) as response:
        assert response.status == 200, await response.text()
        await response.read()


async def _generate(mesh: ScriptedMesh) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(mesh.channel)
    call = stub.Generate(
        inference_pb2.GenerateRequest(), metadata=mesh.edge.metadata(tenant="victim"), timeout=20
    )
    assert [message async for message in call]


async def _check(mesh: ScriptedMesh) -> None:
    stub = health_pb2_grpc.HealthStub(mesh.channel)
    await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)


async def _is_healthy(mesh: ScriptedMesh) -> bool:
    async with mesh.http.get("/healthz") as response:
        return response.status == 200


async def _repeat(
    count: int, call: Callable[[ScriptedMesh], Awaitable[None]], mesh: ScriptedMesh
) -> None:
    for _ in range(count):
        await call(mesh)


async def _p99(call: Callable[[], Awaitable[None]]) -> float:
    seconds = []
    for _ in range(_VICTIM_CALLS):
        start = time.perf_counter()
        await call()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[int(0.99 * _VICTIM_CALLS) - 1]


class Victim:
    """A caller who measures how long calls take, before and during an attack."""

    def __init__(self, mesh: ScriptedMesh) -> None:
        self._mesh = mesh
        self._quiet: dict[Any, float] = {}

    async def measure(self) -> None:
        for call in (_chat, _generate):
            await call(self._mesh)
            self._quiet[call] = await _p99(lambda call=call: call(self._mesh))  # type: ignore[misc]

    async def is_well(self) -> None:
        """Checks that p99 is within twice of quiet, and that health says so."""
        for call, quiet in self._quiet.items():
            seconds = await _p99(lambda call=call: call(self._mesh))  # type: ignore[misc]
            assert seconds < 2 * quiet + _NOISE_SECONDS, f"{call}: {seconds} s, quiet: {quiet} s"
        assert await _is_healthy(self._mesh)


@asynccontextmanager
async def _attacked(
    home: Any, limits: Limits, connections: int
) -> AsyncIterator[tuple[ScriptedMesh, Victim, list[Attacker]]]:
    async with scripted_mesh(home, limits=limits) as mesh:
        victim = Victim(mesh)
        await victim.measure()
        async with attackers(mesh.edge.address, connections) as made:
            yield mesh, victim, made


def _half_sent(mesh: ScriptedMesh, attacker: Attacker, count: int, path: str) -> None:
    for _ in range(count):
        attacker.open(
            mesh.edge.address, path, mesh.edge.bearer(), body=struct.pack(">BI", 0, 100) + b"x"
        )


@pytest.mark.parametrize(
    "path",
    [
        GENERATE_PATH,
        CHAT_COMPLETIONS_PATH,
        "/inference.GRPCInferenceService/ModelInfer",
        "/headrace.jobs.v1.JobService/SubmitJob",
    ],
)
async def test_half_sent_bodies_take_no_places(tmp_path, path: str) -> None:
    """5 times 1,000 bodies that never end: chat goes on, and none of them reaches a service."""
    async with _attacked(tmp_path, _PATIENT, 5) as (mesh, victim, made):
        calls = mesh.inference.calls
        for attacker in made:
            _half_sent(mesh, attacker, 1000, path)
            await attacker.sent()
        await asyncio.sleep(0.5)
        await victim.is_well()
        assert sum(attacker.running for attacker in made) == 5000
        assert mesh.inference.calls == calls + _VICTIM_CALLS


async def test_half_sent_bodies_end_with_a_clear_error(tmp_path) -> None:
    """What does not arrive in time is ended by the edge, which says why."""
    async with _attacked(tmp_path, _BODIES, 1) as (mesh, _, (attacker,)):
        _half_sent(mesh, attacker, 10, GENERATE_PATH)
        await until_running([attacker], 0, seconds=8)
        answer = attacker.answers[1]
        assert (answer["grpc-status"], answer[":status"]) == ("4", "200")
        assert "body of the request did not arrive in time" in answer["grpc-message"]
        headers = {**mesh.edge.bearer(), "content-length": "10"}

        async def body() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.sleep(20)

        async with mesh.http.post(CHAT_COMPLETIONS_PATH, data=body(), headers=headers) as response:
            assert response.status == 408
            assert (await response.json())["error"]["code"] == "deadline_exceeded"


async def test_bodies_that_drip_end_in_time(tmp_path) -> None:
    """A byte now and then does not keep a request open."""
    async with _attacked(tmp_path, _BODIES, 1) as (mesh, victim, (attacker,)):
        _half_sent(mesh, attacker, 100, GENERATE_PATH)
        start = time.monotonic()
        while attacker.running and time.monotonic() < start + 10:
            for stream_id in range(1, 200, 2):
                attacker.send(stream_id, b"x")
            await asyncio.sleep(0.5)
        assert not attacker.running
        assert _BODIES.body_seconds - 1 < time.monotonic() - start < _BODIES.body_seconds + 3
        await victim.is_well()


async def test_a_caller_who_waits_for_long_is_not_ended(tmp_path) -> None:
    """The timeouts of bodies end with the body: an answer may take its time."""
    async with scripted_mesh(tmp_path, limits=Limits(body_seconds=1, body_idle_seconds=1)) as mesh:
        deadlines = []

        async def generate(_request: Any, context: Any) -> AsyncIterator[Any]:
            deadlines.append(context.time_remaining())
            await asyncio.sleep(2.5)
            yield inference_pb2.GenerateResponse()

        mesh.inference.generate = generate
        await _generate(mesh)
        assert 18 < deadlines[0] <= 20
        stub = inference_pb2_grpc.InferenceServiceStub(mesh.channel)
        call = stub.Generate(inference_pb2.GenerateRequest(), metadata=mesh.edge.metadata())
        assert [message async for message in call]
        assert deadlines[1] is None or deadlines[1] > 500


async def test_open_watches_take_no_places(tmp_path) -> None:
    """4,096 Health/Watch without a token: chat and checks go on; watches have few places."""
    async with _attacked(tmp_path, _OPEN, 4) as (mesh, victim, made):
        for attacker in made:
            for _ in range(1024):
                attacker.open(mesh.edge.address, _WATCH, body=bytes(5), complete=True)
            await attacker.sent()
        await until_running(made, 400, seconds=20)  # the rest is refused
        await victim.is_well()
        for _ in range(20):
            await _check(mesh)
        assert 0 < sum(attacker.running for attacker in made) <= 400
        refused = [a for attacker in made for a in attacker.answers.values() if "grpc-status" in a]
        assert {answer["grpc-status"] for answer in refused} == {"14"}


async def test_job_watches_take_no_places_of_other_calls(tmp_path) -> None:
    """Who watches as many jobs as the edge allows still leaves room to submit some."""
    async with scripted_mesh(tmp_path, limits=Limits(max_requests=16)) as mesh:

        async def endless() -> AsyncIterator[str]:
            yield "x"
            await asyncio.Event().wait()

        mesh.jobs.watch = endless
        stub = jobs_pb2_grpc.JobServiceStub(mesh.channel)
        watches = [
            stub.WatchJob(jobs_pb2.WatchJobRequest(), metadata=mesh.edge.metadata())
            for _ in range(16)
        ]
        for watch in watches:
            await watch.read()
        answer = await stub.GetJob(jobs_pb2.GetJobRequest(), metadata=mesh.edge.metadata())
        assert answer.job.name == "x"
        for watch in watches:
            watch.cancel()


async def test_health_tells_that_no_request_finds_a_place(tmp_path) -> None:
    """`/healthz` is 503 with a reason while chat would be refused, and 200 again afterwards."""
    async with scripted_mesh(tmp_path, limits=Limits(max_requests=8)) as mesh:
        go_on = asyncio.Event()

        async def generate(_request: Any, _context: Any) -> AsyncIterator[Any]:
            yield inference_pb2.GenerateResponse()
            await go_on.wait()

        mesh.inference.generate = generate
        stub = inference_pb2_grpc.InferenceServiceStub(mesh.channel)
        request = inference_pb2.GenerateRequest()
        calls = [stub.Generate(request, metadata=mesh.edge.metadata()) for _ in range(8)]
        for call in calls:
            await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(request, metadata=mesh.edge.metadata()).read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert reason_of(caught.value) == "EDGE_UNAVAILABLE"
        async with mesh.http.get("/healthz") as response:
            assert response.status == 503
            (info, _) = (await response.json())["details"]
            assert info["metadata"] == {"cause": "overflow"}
        go_on.set()
        for call in calls:
            assert await call.read() is grpc.aio.EOF  # type: ignore[attr-defined]  # stubs lack it
        async with asyncio.timeout(5):
            while not await _is_healthy(mesh):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.1)


async def test_one_tenant_is_limited_and_others_are_not(tmp_path) -> None:
    """Each tenant has a rate of its own; who exceeds it learns when to come back."""
    async with scripted_mesh(tmp_path, limits=Limits(tenant_requests_per_second=5)) as mesh:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _repeat(20, _generate, mesh)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason_of(caught.value) == "RATE_LIMITED"
        headers = mesh.edge.bearer(tenant="victim")
        async with mesh.http.post(CHAT_COMPLETIONS_PATH, json={}, headers=headers) as response:
            assert response.status == 429
            assert response.headers["retry-after"] == "1"
            error = (await response.json())["error"]
            assert (error["code"], error["type"]) == ("rate_limited", "rate_limit_error")
        headers = mesh.edge.bearer(tenant="other")
        async with mesh.http.post(CHAT_COMPLETIONS_PATH, json={}, headers=headers) as response:
            assert response.status == 200


async def test_calls_without_a_token_are_limited_by_address(tmp_path) -> None:
    """They have few places per second; calls with a token have theirs."""
    async with scripted_mesh(tmp_path, limits=Limits(open_requests_per_second=5)) as mesh:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _repeat(30, _check, mesh)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await _generate(mesh)


@pytest.mark.parametrize(
    "path", [_WATCH, "/grpc.health.v1.Health/Check", "/inference.GRPCInferenceService/ServerLive"]
)
async def test_open_methods_take_small_uncompressed_messages(tmp_path, path: str) -> None:
    """A compressed or long message is refused before a service sees it."""
    async with scripted_mesh(tmp_path) as mesh:
        method = mesh.channel.unary_stream(path, bytes, bytes)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(bytes(MAX_OPEN_BODY_BYTES)).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert reason_of(caught.value) == "MESSAGE_TOO_LARGE"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(b"", compression=grpc.Compression.Gzip).read()
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "compressed" in (caught.value.details() or "")


async def test_silent_connections_take_no_places(tmp_path) -> None:
    """3,000 connections that send nothing or half a request: chat goes on."""
    async with _attacked(tmp_path, Limits(), 0) as (mesh, victim, _), AsyncExitStack() as stack:
        host, _, port = mesh.edge.address.rpartition(":")
        for number in range(3000):
            _, writer = await asyncio.open_connection(host, int(port))
            stack.callback(writer.transport.abort)
            if number % 2:
                writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: edge\r\n")
        await victim.is_well()


async def test_connections_beyond_the_limit_are_closed(tmp_path) -> None:
    """Those that were there before go on."""
    async with scripted_mesh(tmp_path, limits=Limits(max_connections=20)) as mesh:
        await _generate(mesh)
        async with attackers(mesh.edge.address, 40) as made:
            async with asyncio.timeout(5):
                while sum(attacker.closed for attacker in made) < 20:  # noqa: ASYNC110 - read by tasks
                    await asyncio.sleep(0.05)
            await _generate(mesh)


async def test_idle_connections_make_room(tmp_path) -> None:
    """Whoever takes all connections and does nothing keeps others out for seconds only."""
    async with (
        scripted_mesh(tmp_path, limits=Limits(max_connections=40)) as mesh,
        attackers(mesh.edge.address, 60) as made,
    ):
        async with asyncio.timeout(10):
            while sum(not attacker.closed for attacker in made) > 30:  # noqa: ASYNC110 - see above
                await asyncio.sleep(0.05)
        await _chat(mesh)
        async with mesh.edge.channel() as mesh.channel:
            await _generate(mesh)


async def test_memory_of_the_edge_is_bounded(tmp_path) -> None:
    """Half-sent bodies of 600 MiB: the edge ends those that hold the most, and chat goes on.

    While they come faster than it ends them, it refuses calls, and says so; not any longer.
    """
    limits = Limits(body_idle_seconds=60, max_heap_mib=384)
    async with _attacked(tmp_path, limits, 4) as (mesh, victim, made):
        process = psutil.Process(mesh.edge.pid)
        peak_bytes = 0
        headers = mesh.edge.bearer()
        part = bytes(16_000)
        for number in range(600):
            attacker = made[number % 4]
            stream_id = attacker.open(mesh.edge.address, GENERATE_PATH, headers, body=bytes(5))
            for _ in range(60):  # as much as the window of a stream allows at once
                attacker.send(stream_id, part)
            await attacker.sent()
            peak_bytes = max(peak_bytes, process.memory_info().rss)
        async with asyncio.timeout(3):
            while not await _is_healthy(mesh):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.1)
        await victim.is_well()
        assert peak_bytes < 1.5 * limits.max_heap_mib * MIB
        assert any(attacker.ended or attacker.closed for attacker in made)
