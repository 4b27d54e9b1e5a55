"""The caller's deadline: it limits every wait, and passing it is not a failure of the backend."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from headrace.common.v1.backend_pb2 import Backend
from headrace.common.v1.model_pb2 import MODEL_KIND_CHAT, ModelSchema
from headrace.router.v1.router_internal_pb2 import ModelRoute, RouteTarget

from libs.chat.request import GenerationRequest, Message
from libs.clock import SystemClock
from libs.errors import DeadlineExceeded
from libs.routes import RouteTable
from services.inference import metrics
from services.inference.backends.openai_http.api_keys import ApiKeys
from services.inference.backends.pool import Backends, Lease
from services.inference.backends.stall import StallLimits
from services.inference.backends.targets import target_of
from services.inference.deadlines import MARGIN_SECONDS, seconds_left
from services.inference.domain import BackendFailedError, ChatCall, Delivered
from services.inference.generation.failover import Failover
from services.inference.generation.hedging import HedgeLimits
from services.inference.generation.relay import Collector
from services.inference.slots import Demand, SlotQueue
from tests.support.backends import provider_backend, triton_backend
from tests.support.http2_peer import http2_peers
from tests.support.provider import mock_provider
from tests.support.tensor_server import TensorServer, serving
from tests.support.triton import mock_triton

STALL = StallLimits(first_token_seconds=30.0, between_tokens_seconds=30.0)
CLOCK = SystemClock()
DEADLINE_SECONDS = 0.3
# More failures than any breaker allows.
ATTEMPTS = 6


class Clock(SystemClock):
    """Stands still."""

    def monotonic_seconds(self):
        return 100.0


@pytest.mark.parametrize(
    ("left", "expected"),
    [(10.0, 10 - MARGIN_SECONDS), (0.06, 0.02), (0.03, 0.005)],
)
def test_time_is_left_to_say_what_timed_out(left, expected):
    """The server ends the call 20 ms early; a part of it ends earlier still."""
    assert seconds_left(100 + left, Clock(), waiting_for="slot") == pytest.approx(expected)
    assert seconds_left(None, Clock(), waiting_for="slot") is None


@pytest.mark.parametrize("left", [0.02, 0.0, -5.0])
def test_nothing_is_started_when_no_time_is_left(left):
    """The answer could not arrive."""
    with pytest.raises(DeadlineExceeded) as caught:
        seconds_left(100 + left, Clock(), waiting_for="slot")
    assert caught.value.metadata == {"waiting_for": "slot"}


def call(*, streamed: bool = True) -> ChatCall:
    return ChatCall(
        request_id="r",
        request=GenerationRequest(model="m", messages=(Message("user", "hello"),)),
        streamed=streamed,
        deadline_seconds=CLOCK.monotonic_seconds() + DEADLINE_SECONDS,
    )


async def generate(lease: Lease, call: ChatCall) -> None:
    await lease.chat.generate(
        lease.target.model,
        call,
        max_tokens=9,
        delivered=Delivered(),
        relay=Collector(on_first=lambda: None),
    )


async def expect_deadline(
    backend: Backend, folder: Path, attempt: Callable[[Lease], Awaitable[object]]
) -> None:
    """Makes attempts that must end at the deadline, and leave the breaker closed."""
    target = target_of(backend)
    assert target is not None
    backends = Backends(clock=CLOCK, keys=ApiKeys(folder, clock=CLOCK), stall=STALL)
    try:
        for _ in range(ATTEMPTS):
            started = CLOCK.monotonic_seconds()
            with pytest.raises(DeadlineExceeded) as caught, backends.lease([backend]) as lease:
                await attempt(lease)
            took = CLOCK.monotonic_seconds() - started
            assert caught.value.metadata == {"waiting_for": "backend"}
            assert took < DEADLINE_SECONDS + 1
        (metric,) = metrics.BREAKER_STATE.labels(target.endpoint.address, target.model).collect()
        assert metric.samples[0].value == 0
    finally:
        await backends.close()


@pytest.mark.parametrize("stalls_after", [0, 2])
async def test_a_silent_triton(stalls_after, tmp_path):
    """It gets the deadline, too, and stops."""
    async with mock_triton(stalls_after=stalls_after) as mock:
        backend = triton_backend("b", mock.address)
        await expect_deadline(backend, tmp_path, lambda lease: generate(lease, call()))
        await asyncio.wait_for(mock.left.wait(), 1)
    assert all(0 < (timeout or 0) < DEADLINE_SECONDS for timeout in mock.timeouts)
    assert len(mock.timeouts) == ATTEMPTS


async def test_a_triton_that_accepts_no_connection(tmp_path):
    """Connecting is part of the time."""
    async with http2_peers() as peers:  # they never greet
        backend = triton_backend("b", peers.address)
        await expect_deadline(backend, tmp_path, lambda lease: generate(lease, call()))


@pytest.mark.parametrize("mode", ["stall_first", "stall_mute", "stall_mid"])
@pytest.mark.parametrize("streamed", [True, False])
async def test_a_silent_provider(mode, streamed, tmp_path):
    """Whatever it sent before; its connection is closed."""
    async with mock_provider(mode) as mock:
        backend = provider_backend("b", mock.base_url)
        attempt = call(streamed=streamed)
        await expect_deadline(
            backend,
            tmp_path,
            lambda lease: generate(
                lease,
                replace(attempt, deadline_seconds=CLOCK.monotonic_seconds() + DEADLINE_SECONDS),
            ),
        )
        await asyncio.wait_for(mock.left.wait(), 1)


async def test_embeddings_and_counted_tokens(tmp_path):
    """What is not generated has the same deadline."""

    def deadline_seconds() -> float:
        return CLOCK.monotonic_seconds() + DEADLINE_SECONDS

    server = TensorServer(stalls=True, final={})
    async with serving(server), mock_triton(stalls_counting=True) as mock:
        await expect_deadline(
            triton_backend("b", server.address),
            tmp_path,
            lambda lease: lease.triton.embed("m", ["a"], deadline_seconds=deadline_seconds()),
        )
        await expect_deadline(
            triton_backend("c", mock.address),
            tmp_path,
            lambda lease: lease.triton.count_tokens(
                "m", call().request.messages, deadline_seconds=deadline_seconds()
            ),
        )
    assert all(0 < (timeout or 0) < DEADLINE_SECONDS for timeout in server.timeouts)


async def test_a_stall_before_the_deadline_is_the_backends_fault(tmp_path):
    """A deadline does not excuse a backend that is silent for too long."""
    stall = StallLimits(first_token_seconds=0.1, between_tokens_seconds=0.1)
    backends = Backends(clock=CLOCK, keys=ApiKeys(tmp_path, clock=CLOCK), stall=stall)
    server = TensorServer(stalls=True)
    later = CLOCK.monotonic_seconds() + 30
    async with serving(server), mock_triton(stalls_after=0) as mock:
        embedder = triton_backend("b", server.address)
        with pytest.raises(BackendFailedError), backends.lease([embedder]) as lease:
            await lease.triton.embed("m", ["a"], deadline_seconds=later)
        chatter = triton_backend("c", mock.address)
        with pytest.raises(BackendFailedError), backends.lease([chatter]) as lease:
            await generate(lease, replace(call(), deadline_seconds=later))
        await backends.close()


async def test_the_wait_for_a_backend_that_does_not_come_back(tmp_path):
    """A failed Triton is waited for, at most until the deadline."""
    target = RouteTarget(
        deployment="deployments/d",
        model_version="models/m/versions/1.0.0",
        schema=ModelSchema(kind=MODEL_KIND_CHAT, max_output_tokens=100),
        backends=[triton_backend("b", "127.0.0.1:9")],
    )
    routes = RouteTable(epoch="e", revision=1, routes=[ModelRoute(model="m", targets=[target])])
    backends = Backends(clock=CLOCK, keys=ApiKeys(tmp_path, clock=CLOCK), stall=STALL)
    failover = Failover(backends=backends, routes=lambda: routes, hedge=HedgeLimits(), clock=CLOCK)
    choice = routes.choose("m", kind=MODEL_KIND_CHAT)
    with pytest.raises(DeadlineExceeded) as caught:
        await failover.call(call(), choice, has_fallback=False).run(
            Collector(on_first=lambda: None)
        )
    assert caught.value.metadata == {"waiting_for": "backend"}
    await backends.close()


async def test_the_wait_for_a_slot():
    """Where the estimate was too short."""
    queue = SlotQueue("deployments/d", CLOCK)
    async with queue.slot(Demand("t")):
        deadline = CLOCK.monotonic_seconds() + DEADLINE_SECONDS
        with pytest.raises(DeadlineExceeded) as caught:
            async with queue.slot(Demand("t", deadline_seconds=deadline)):
                raise AssertionError("there is no free slot")
        assert caught.value.metadata == {"waiting_for": "slot"}
    async with asyncio.timeout(1), queue.slot(Demand("t")):
        pass
