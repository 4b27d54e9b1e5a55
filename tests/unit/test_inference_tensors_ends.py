"""How requests of the Open Inference Protocol end: streams, and callers who leave."""

from __future__ import annotations

import asyncio
import json
import struct

import pytest

from libs.clock import SystemClock
from libs.errors import (
    DeadlineExceeded,
    Unavailable,
)
from services.inference.tensors.oip import Caller
from tests.support.embedding import eventually
from tests.support.tensor_mesh import (
    CALLER,
    mesh_of,
    request,
)
from tests.support.tensor_server import FINAL, TensorServer


@pytest.mark.parametrize("how", [{"dies_after": 2}, {"final": {}}, {"stalls": True}])
async def test_an_interrupted_stream_is_an_error_and_its_tokens_are_billed(how, tmp_path):
    """No other backend starts again: what was delivered cannot be taken back."""
    bad, other = TensorServer(**how), TensorServer(**how)
    async with mesh_of(bad, other, tmp_path=tmp_path) as mesh:
        with pytest.raises(Unavailable) as caught:
            await mesh.stream(request("chatter"))
        await mesh.recorder.drain()
    assert caught.value.reason == "BACKEND_FAILED"
    assert len(bad.requests) + len(other.requests) == 1
    (bill,) = mesh.bills.recorded
    assert bill["usage"].completion_tokens == how.get("dies_after", 3)


async def test_the_last_message_waits_until_the_usage_is_recorded(tmp_path):
    """If that fails the caller gets an error in its place, and nothing is billed twice."""
    server = TensorServer()
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        mesh.bills.is_down = True
        answers: list[bytes] = []

        async def deliver(message: bytes) -> None:
            answers.append(message)

        with pytest.raises(Unavailable, match="bus"):
            await mesh.service.stream(request("chatter").SerializeToString(), CALLER, deliver)
        await mesh.recorder.drain()
    assert len(answers) == 3
    assert mesh.bills.recorded == []


async def test_a_cancelled_call_stops_the_backend(tmp_path):
    """What was generated before is billed."""
    server = TensorServer(stalls=True)
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        received, all_received = 0, asyncio.Event()

        async def deliver(_message: bytes) -> None:
            nonlocal received
            received += 1
            if received == 3:
                all_received.set()

        asked = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
        raw = struct.pack("<I", len(asked)) + asked
        message = request("chatter")
        message.raw_input_contents[:] = [raw]
        message = message.SerializeToString()
        reading = asyncio.create_task(mesh.service.stream(message, CALLER, deliver))
        await all_received.wait()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        async with asyncio.timeout(1):
            await server.left.wait()
        await mesh.recorder.drain()
    (bill,) = mesh.bills.recorded
    assert (bill["usage"].prompt_tokens, bill["usage"].completion_tokens) == (100, 3)


@pytest.mark.parametrize("why", ["left", "deadline"])
async def test_who_leaves_a_unary_call_pays_for_it(tmp_path, why):
    """The backend cannot stop in the middle: its slot is taken until it has ended."""
    server = TensorServer()
    server.gate.clear()
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        if why == "deadline":
            now = SystemClock().monotonic_seconds()
            mesh.caller = Caller(CALLER.identity, now + 0.2)
        calling = asyncio.create_task(mesh.infer(request("embedder")))
        await eventually(lambda: bool(server.requests))
        if why == "left":
            calling.cancel()
        await asyncio.wait([calling])
        assert mesh.bills.recorded == []
        server.gate.set()
        await mesh.service.drain()
        await mesh.recorder.drain()
    if why == "left":
        assert calling.cancelled()
    else:
        error = calling.exception()
        assert isinstance(error, DeadlineExceeded)
        assert error.metadata == {"waiting_for": "backend"}
    assert [bill["usage"].prompt_tokens for bill in mesh.bills.recorded] == [7]


async def test_a_unary_call_without_time_left_is_not_started(tmp_path):
    """Else a backend would compute what nobody waits for and nobody pays for."""
    server = TensorServer()
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        mesh.caller = Caller(CALLER.identity, SystemClock().monotonic_seconds() - 1.0)
        with pytest.raises(DeadlineExceeded):
            await mesh.infer(request("embedder"))
        await asyncio.sleep(0.1)
        await mesh.service.drain()
        await mesh.recorder.drain()
    assert server.requests == []
    assert mesh.bills.recorded == []


async def test_fields_that_a_model_adds_to_its_end_are_skipped(tmp_path):
    """A newer model still answers, and is billed."""
    server = TensorServer(final={**FINAL, "draft_tokens": 7, "timings": {"ms": 1.5}})
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        answers = await mesh.stream(request("chatter"))
    assert len(answers) == 4
    assert [bill["usage"].prompt_tokens for bill in mesh.bills.recorded] == [9]


@pytest.mark.parametrize(
    "wrong",
    [
        {"finish_reason": None},
        {"prompt_tokens": "9"},
        {"cached_tokens": -1},
        {"prompt_tokens": 2**31},
    ],
)
async def test_a_malformed_end_is_the_backends_fault(wrong, tmp_path):
    """Neither the caller's, nor an error of this service."""
    server = TensorServer(final=FINAL | wrong)
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        with pytest.raises(Unavailable) as caught:
            await mesh.stream(request("chatter"))
        await mesh.recorder.drain()
    assert caught.value.reason == "BACKEND_FAILED"
    assert [bill["usage"].completion_tokens for bill in mesh.bills.recorded] == [3]


async def test_the_callers_deadline_is_passed_on_and_charged_to_no_backend(tmp_path):
    """Shorter than any stall: the caller learns what it waited for, the breaker stays closed."""
    server = TensorServer(stalls=True)
    async with mesh_of(server, tmp_path=tmp_path) as mesh:
        for _ in range(6):  # enough failures would open the breaker
            now = SystemClock().monotonic_seconds()
            mesh.caller = Caller(CALLER.identity, now + 0.2)
            with pytest.raises(DeadlineExceeded) as caught:
                await mesh.stream(request("chatter"))
            assert caught.value.metadata == {"waiting_for": "backend"}
        server.stalls, mesh.caller = False, CALLER
        await mesh.stream(request("chatter"))
        await mesh.recorder.drain()
    assert all(timeout is not None and timeout < 0.2 for timeout in server.timeouts[:6])
    assert server.timeouts[-1] is None
