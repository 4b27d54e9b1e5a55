"""One answer from several backends: breakers, retries, resumes, hedges. All are real servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from libs.errors import (
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from services.inference.backends import pool as backends_module
from services.inference.backends.breaker import BreakerLimits
from services.inference.backends.openai_http.errors import MAX_ATTEMPTS
from services.inference.domain import BackendFailedError
from services.inference.generation import failover as failover_module
from tests.support.failover import Answer, mesh_of, state_of
from tests.support.provider import TEXT, WORDS, mock_provider
from tests.support.triton import TEXT as TRITON_TEXT
from tests.support.triton import MockTriton, mock_triton


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
