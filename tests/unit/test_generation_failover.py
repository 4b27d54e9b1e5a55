"""One answer from several backends: breakers, retries, resumes, hedges. All are real servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from headrace.common.v1.backend_pb2 import Backend
from headrace.common.v1.model_pb2 import MODEL_KIND_CHAT, ModelSchema
from headrace.router.v1.router_internal_pb2 import ModelRoute, RouteTarget

from libs.chat.request import GenerationRequest, Message
from libs.clock import SystemClock
from libs.errors import (
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from libs.routes import RouteTable
from services.inference import metrics
from services.inference.backends import pool as backends_module
from services.inference.backends.breaker import BreakerLimits
from services.inference.backends.openai_http.api_keys import ApiKeys
from services.inference.backends.openai_http.errors import MAX_ATTEMPTS
from services.inference.backends.pool import Backends
from services.inference.backends.stall import StallLimits
from services.inference.domain import BackendFailedError, ChatCall
from services.inference.generation import failover as failover_module
from services.inference.generation.failover import DeploymentCall, Failover
from services.inference.generation.hedging import (
    MAX_SAVED_HEDGES,
    HedgeBudget,
    HedgeLimits,
)
from services.inference.generation.relay import Relay
from tests.support.backends import provider_backend, triton_backend
from tests.support.provider import TEXT, WORDS, MockProvider, mock_provider
from tests.support.triton import TEXT as TRITON_TEXT
from tests.support.triton import MockTriton, mock_triton

CALL = ChatCall(
    request_id="r", request=GenerationRequest(model="m", messages=(Message("user", "hello"),))
)
STALL = StallLimits(first_token_seconds=0.4, between_tokens_seconds=0.3)
NO_HEDGE = HedgeLimits()


@dataclass
class Answer:
    text: str = ""
    call: DeploymentCall | None = None


@dataclass
class Mesh:
    """Failover over backends, without the servers around it."""

    backends: Backends
    failover: Failover
    table: RouteTable
    targets: list[Backend] = field(default_factory=list)

    async def ask(self, answer: Answer | None = None) -> Answer:
        """Runs one answer and returns it; `answer` has what was delivered before an error."""
        answer = answer or Answer()
        relay = Relay()
        choice = self.table.choose("m", kind=MODEL_KIND_CHAT)
        answer.call = self.failover.call(CALL, choice, has_fallback=False)

        async def read() -> None:
            while (chunk := await relay.take()) is not None:
                answer.text += chunk.text

        reader = asyncio.create_task(read())
        try:
            await answer.call.run(relay)
        finally:
            relay.close()
            await reader
        return answer

    def route(self, targets: Sequence[Backend]) -> None:
        """Replaces the routes: one model, one version."""
        target = RouteTarget(
            deployment="deployments/d",
            model_version="models/m/versions/1.0.0",
            schema=ModelSchema(kind=MODEL_KIND_CHAT, max_output_tokens=100),
            backends=targets,
        )
        self.targets = list(targets)
        self.table = RouteTable(
            epoch="e", revision=1, routes=[ModelRoute(model="m", targets=[target])]
        )


@asynccontextmanager
async def mesh_of(
    *servers: MockProvider | MockTriton, tmp_path: Path, hedge: HedgeLimits = NO_HEDGE
) -> AsyncIterator[Mesh]:
    clock = SystemClock()
    backends = Backends(clock=clock, keys=ApiKeys(tmp_path, clock=clock), stall=STALL)
    failover = Failover(backends=backends, routes=lambda: mesh.table, hedge=hedge, clock=clock)
    mesh = Mesh(backends, failover, RouteTable(epoch="e", revision=0, routes=[]))
    mesh.route([backend_of(server, f"b{index}") for index, server in enumerate(servers)])
    try:
        yield mesh
    finally:
        await backends.close()


def backend_of(server: MockProvider | MockTriton, identifier: str) -> Backend:
    if isinstance(server, MockTriton):
        return triton_backend(identifier, server.address, model="m-1.0.0-abc")
    return provider_backend(identifier, server.base_url, model="upstream")


@pytest.fixture
async def servers() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.mark.parametrize("mode", ["500", "429", "401", "cut_first", "garbage", "stall_first"])
async def test_another_backend_answers_where_nothing_was_delivered(mode, tmp_path, servers):
    """The caller does not notice the failure."""
    bad = await servers.enter_async_context(mock_provider(mode))
    good = await servers.enter_async_context(mock_provider())
    async with mesh_of(bad, good, tmp_path=tmp_path) as mesh:
        answer = await mesh.ask()
    assert answer.text == TEXT
    assert (len(bad.requests), len(good.requests)) == (1, 1)
    assert answer.call is not None
    assert answer.call.resumed_count == 0
    assert answer.call.delivered.token_count == 9


RAISED = "Failed to process the request(s) for model instance 'm', message: ValueError: canary"


async def test_a_request_on_which_the_model_fails_opens_no_breaker(tmp_path, servers):
    """Two backends try it; then its caller gets the error, at once, and others are answered."""
    mocks = [await servers.enter_async_context(mock_triton()) for _ in range(3)]
    async with mesh_of(*mocks, tmp_path=tmp_path) as mesh:
        for _ in range(10):
            for mock in mocks:
                mock.error_message = RAISED
            with pytest.raises(Internal) as caught:
                await mesh.ask()
            assert caught.value.reason == "MODEL_FAILED"
            assert "canary" not in caught.value.message
        for mock in mocks:
            mock.error_message = ""
        answer = await mesh.ask()
    assert answer.text == TRITON_TEXT
    assert sum(len(mock.requests) for mock in mocks) == 10 * 2 + 1


async def test_a_model_that_fails_on_one_backend_only_is_that_backends_fault(tmp_path, servers):
    """The other one answers every request, and after a few the broken one is not called."""
    broken = await servers.enter_async_context(mock_triton(error_message=RAISED))
    good = await servers.enter_async_context(mock_triton())
    async with mesh_of(broken, good, tmp_path=tmp_path) as mesh:
        for _ in range(20):
            assert (await mesh.ask()).text == TRITON_TEXT
    assert len(broken.requests) == 5


async def test_no_backend_continues_the_answer_of_a_provider(tmp_path, servers):
    """The other backend is not called; the caller keeps what came and gets an error."""
    bad = await servers.enter_async_context(mock_provider("cut_mid"))
    good = await servers.enter_async_context(mock_provider())
    async with mesh_of(bad, good, tmp_path=tmp_path) as mesh:
        answer = Answer()
        with pytest.raises(Unavailable) as caught:
            await mesh.ask(answer)
    assert caught.value.reason == "BACKEND_FAILED"
    assert caught.value.metadata == {"backend": "b0", "request_id": "r"}
    assert answer.text == "".join(WORDS[:2])
    assert not good.requests


async def test_a_server_error_is_retried_a_few_times(tmp_path, servers):
    """With pauses, and not for as long as a restart may take."""
    bad = await servers.enter_async_context(mock_provider("500"))
    async with mesh_of(bad, tmp_path=tmp_path) as mesh:
        with pytest.raises(Unavailable) as caught:
            await mesh.ask()
    assert caught.value.reason == "BACKEND_FAILED"
    assert len(bad.requests) == MAX_ATTEMPTS


async def test_a_rate_limit_is_respected_and_reported(tmp_path, servers):
    """Until it is over, no request is sent to the provider."""
    limited = await servers.enter_async_context(mock_provider("429"))
    limited.retry_after = "7"
    async with mesh_of(limited, tmp_path=tmp_path) as mesh:
        for _ in range(3):
            with pytest.raises(ResourceExhausted) as caught:
                await mesh.ask()
            assert caught.value.reason == "BACKEND_RATE_LIMITED"
            assert 6 < (caught.value.retry_after_seconds or 0) <= 7
    assert len(limited.requests) == 1


async def test_a_wrong_configuration_is_reported_at_once(tmp_path, servers):
    """It is not retried for the same request."""
    bad = await servers.enter_async_context(mock_provider("401"))
    async with mesh_of(bad, tmp_path=tmp_path) as mesh:
        with pytest.raises(FailedPrecondition) as caught:
            await mesh.ask()
    assert caught.value.reason == "BACKEND_MISCONFIGURED"
    assert len(bad.requests) == 1


async def test_a_refused_request_is_not_sent_to_another_backend(tmp_path, servers):
    """It would be refused there as well; the breaker does not count it."""
    bad = await servers.enter_async_context(mock_provider("400"))
    good = await servers.enter_async_context(mock_provider())
    async with mesh_of(bad, good, tmp_path=tmp_path) as mesh:
        for _ in range(20):
            with pytest.raises(InvalidArgument):
                await mesh.ask()
        assert state_of(mesh, 0) == 0
    assert not good.requests


def state_of(mesh: Mesh, index: int) -> float:
    """Returns the state of a breaker, as Prometheus sees it: 0 closed, 1 half-open, 2 open."""
    backend = mesh.targets[index]
    gauge = metrics.BREAKER_STATE.labels(backend.provider.base_url, backend.provider.model)
    (metric,) = gauge.collect()
    return float(metric.samples[0].value)


async def test_a_breaker_opens_and_recovers_by_few_probes(tmp_path, servers, monkeypatch):
    """While it is open the backend is not called; then two requests probe it; then all are sent."""
    limits = BreakerLimits(consecutive_failures=2, open_seconds=0.6, probes=2, probes_to_close=2)
    monkeypatch.setattr(backends_module, "PROVIDER_BREAKER", limits)
    provider = await servers.enter_async_context(mock_provider("500"))
    async with mesh_of(provider, tmp_path=tmp_path) as mesh:
        with pytest.raises(Unavailable):
            await mesh.ask()
        assert state_of(mesh, 0) == 2
        assert len(provider.requests) == 2
        await asyncio.sleep(0.6)
        assert state_of(mesh, 0) == 1
        provider.mode = "stall_mute"
        tries = [asyncio.create_task(mesh.ask()) for _ in range(10)]
        await asyncio.sleep(0.1)
        assert len(provider.requests) == 2 + limits.probes
        provider.mode = "ok"
        for one in tries:
            one.cancel()
        await asyncio.gather(*tries, return_exceptions=True)
        assert state_of(mesh, 0) == 1  # a cancelled probe decides nothing
        for _ in range(limits.probes_to_close):
            await mesh.ask()
        assert state_of(mesh, 0) == 0
        answers = await asyncio.gather(*(mesh.ask() for _ in range(10)))
    assert {answer.text for answer in answers} == {TEXT}


async def test_a_probe_has_succeeded_with_its_first_token(tmp_path, servers, monkeypatch):
    """A long answer does not hold the breaker half-open until its end."""
    limits = BreakerLimits(consecutive_failures=1, open_seconds=0.05, probes=1, probes_to_close=1)
    monkeypatch.setattr(backends_module, "PROVIDER_BREAKER", limits)
    provider = await servers.enter_async_context(mock_provider("500"))
    async with mesh_of(provider, tmp_path=tmp_path) as mesh:
        with pytest.raises(Unavailable):
            await mesh.ask()
        provider.mode, provider.pause_seconds = "slow", 0.2
        await asyncio.sleep(0.4)
        running = asyncio.create_task(mesh.ask())
        await asyncio.sleep(0.3)
        assert state_of(mesh, 0) == 0
        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_request_is_sent_to_the_backend_with_the_fewest(tmp_path, servers):
    """Counted in this process: ten at once are five each."""
    first = await servers.enter_async_context(mock_provider("slow"))
    second = await servers.enter_async_context(mock_provider("slow"))
    async with mesh_of(first, second, tmp_path=tmp_path) as mesh:
        await asyncio.gather(*(mesh.ask() for _ in range(10)))
    assert (len(first.requests), len(second.requests)) == (5, 5)


@pytest.mark.parametrize("behaviour", [{"dies_after": 2}, {"stalls_after": 2}])
async def test_another_triton_continues_a_stream(behaviour, tmp_path, servers):
    """After a death and after a stall alike: no token twice, none missing."""
    bad = await servers.enter_async_context(mock_triton(**behaviour))
    good = await servers.enter_async_context(mock_triton())
    async with mesh_of(bad, good, tmp_path=tmp_path) as mesh:
        answer = await mesh.ask()
    assert answer.text == TRITON_TEXT
    assert good.requests[0]["resume"] == {"pieces": [7, 8]}
    assert answer.call is not None
    assert answer.call.resumed_count == 1


async def test_a_triton_that_stalls_before_its_first_token_is_abandoned(tmp_path, servers):
    """And its engine is cancelled."""
    bad = await servers.enter_async_context(mock_triton(stalls_after=0))
    good = await servers.enter_async_context(mock_triton())
    async with mesh_of(bad, good, tmp_path=tmp_path) as mesh:
        assert (await mesh.ask()).text == TRITON_TEXT
        await asyncio.wait_for(bad.left.wait(), 0.5)


async def test_a_triton_that_is_down_is_waited_for(tmp_path, monkeypatch):
    """Unlike a provider: it may be restarting."""
    monkeypatch.setattr(failover_module, "FAILOVER_WAIT_SECONDS", 0.6)
    unreachable = MockTriton(address="127.0.0.1:9")
    async with mesh_of(unreachable, tmp_path=tmp_path) as mesh:
        started = asyncio.get_running_loop().time()
        with pytest.raises(Unavailable) as caught:
            await mesh.ask()
        assert 0.5 < asyncio.get_running_loop().time() - started < 2
    assert caught.value.reason == "BACKEND_FAILED"


HEDGE = HedgeLimits(after_seconds=0.05, max_share=1.0)


async def test_a_late_first_token_comes_from_the_second_backend(tmp_path, servers):
    """The reader sees one answer, the late backend is cancelled."""
    late = await servers.enter_async_context(mock_provider("stall_first"))
    good = await servers.enter_async_context(mock_provider("slow"))
    before = metrics.HEDGED_REQUESTS.labels("m", "second")._value.get()
    async with mesh_of(late, good, tmp_path=tmp_path, hedge=HEDGE) as mesh:
        answer = await mesh.ask()
        await asyncio.wait_for(late.left.wait(), 0.5)
        assert state_of(mesh, 0) == 0  # being slow does not count as a failure
    assert answer.text == TEXT
    assert answer.call is not None
    assert answer.call.delivered.token_count == 9
    assert metrics.HEDGED_REQUESTS.labels("m", "second")._value.get() == before + 1


async def test_the_first_backend_wins_if_it_is_first_after_all(tmp_path, servers):
    """The first chunk decides, not the order of the calls."""
    late = await servers.enter_async_context(mock_triton())
    later = await servers.enter_async_context(mock_triton(stalls_after=0))
    async with mesh_of(late, later, tmp_path=tmp_path, hedge=HEDGE) as mesh:
        assert (await mesh.ask()).text == TRITON_TEXT
    assert not later.requests


async def test_hedging_is_limited_to_its_share(tmp_path, servers):
    """A slow pool does not get twice the work."""
    late = await servers.enter_async_context(mock_provider("slow"))
    late.pause_seconds = 0.06
    other = await servers.enter_async_context(mock_provider("slow"))
    other.pause_seconds = 0.06
    hedge = HedgeLimits(after_seconds=0.02, max_share=0.25)
    async with mesh_of(late, other, tmp_path=tmp_path, hedge=hedge) as mesh:
        await asyncio.gather(*(mesh.ask() for _ in range(8)))
    assert len(late.requests) + len(other.requests) == 8 + 2


async def test_if_both_fail_both_are_reported(tmp_path, servers):
    """A failed hedge does not end the first attempt; the call fails when both have failed."""
    late = await servers.enter_async_context(mock_provider("stall_mute"))
    bad = await servers.enter_async_context(mock_provider("401"))
    async with mesh_of(late, bad, tmp_path=tmp_path, hedge=HEDGE) as mesh:
        with pytest.raises((Unavailable, FailedPrecondition)) as caught:
            await mesh.ask()
    assert caught.value.metadata == {"backend": "b0,b1", "request_id": "r"}


async def test_a_cancelled_hedged_request_leaves_nothing_running(tmp_path, servers):
    """Both backends are cancelled, and no task is left."""
    late = await servers.enter_async_context(mock_provider("stall_mute"))
    later = await servers.enter_async_context(mock_provider("stall_mute"))
    async with mesh_of(late, later, tmp_path=tmp_path, hedge=HEDGE) as mesh:
        before = asyncio.all_tasks()
        running = asyncio.create_task(mesh.ask())
        await asyncio.wait_for(asyncio.gather(late.asked.wait(), later.asked.wait()), 1)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await asyncio.wait_for(asyncio.gather(late.left.wait(), later.left.wait()), 0.5)
        assert not [task for task in asyncio.all_tasks() - before if "ask" in repr(task)]


def test_saved_hedges_are_limited():
    """Many requests without hedges do not allow a burst of hedges later."""
    budget = HedgeBudget(HedgeLimits(after_seconds=1, max_share=0.5))
    assert not budget.take()
    for _ in range(1000):
        budget.count_request()
    assert sum(budget.take() for _ in range(1000)) == MAX_SAVED_HEDGES


async def test_backends_without_a_route_are_closed(tmp_path, servers):
    """Unless a request still runs on it."""
    removed = await servers.enter_async_context(mock_provider("slow"))
    kept = await servers.enter_async_context(mock_triton())
    async with mesh_of(removed, kept, tmp_path=tmp_path) as mesh:
        running = asyncio.create_task(mesh.ask())
        await removed.asked.wait()
        mesh.backends.retain(mesh.targets[1:])
        assert (await running).text == TEXT
        mesh.backends.retain(mesh.targets[1:])
        await asyncio.sleep(0)
        assert [one.address for one in mesh.backends._connections] == [kept.address]
        mesh.route(mesh.targets[1:])
        assert (await mesh.ask()).text == TRITON_TEXT


async def test_only_a_triton_embeds(tmp_path, servers):
    """A provider in its place is a failed backend, not a crash."""
    provider = await servers.enter_async_context(mock_provider())
    async with mesh_of(provider, tmp_path=tmp_path) as mesh:
        with (
            pytest.raises(BackendFailedError, match="not a Triton"),
            mesh.backends.lease(mesh.targets) as lease,
        ):
            await lease.triton.embed("m", ["text"], deadline_seconds=None)
