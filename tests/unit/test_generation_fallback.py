"""Which deployment answers if one fails, and answers without a reader, with real HTTP servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from headrace.common.v1.model_pb2 import MODEL_KIND_CHAT, ModelSchema
from headrace.router.v1.router_internal_pb2 import ModelRoute, RouteTarget

from libs.chat.request import GenerationRequest, Message
from libs.clock import SystemClock
from libs.errors import ResourceExhausted, Unavailable
from libs.routes import EMPTY, Choice, RouteTable
from libs.rpc.identity import Identity
from libs.telemetry.hashing import InputHasher
from services.inference.accounting import Outcome, Recorder, UncountedPrompt
from services.inference.admission import Admission
from services.inference.backends.openai_http.api_keys import ApiKeys
from services.inference.backends.pool import Backends
from services.inference.backends.stall import StallLimits
from services.inference.cache_salts import CacheSalts
from services.inference.domain import ChatCall, Chunk, Started
from services.inference.generation import relay as relay_module
from services.inference.generation.generator import Generator
from services.inference.generation.hedging import HedgeLimits
from services.inference.generation.relay import RelayLimits
from tests.support.backends import provider_backend
from tests.support.provider import TEXT, MockProvider, mock_provider

CALL = ChatCall(
    request_id="r", request=GenerationRequest(model="m", messages=(Message("user", "hello"),))
)
CALLER = Identity(tenant="t", user="u")


class Notes:
    """Keeps what would be billed."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    async def record(self, outcome: Outcome) -> int:
        self.outcomes.append(outcome)
        return 0

    def record_later(self, outcome: Outcome, *, prompt: UncountedPrompt | None = None) -> None:
        self.outcomes.append(outcome)


async def _no_count(_choice: Choice, _request: GenerationRequest, _tenant: str) -> int:
    raise AssertionError("providers count no prompts")


class Mesh:
    """A generator over one model, whose versions have a provider each."""

    def __init__(self, folder: Path) -> None:
        clock = SystemClock()
        stall = StallLimits(first_token_seconds=5.0, between_tokens_seconds=5.0)
        self.notes = Notes()
        self.backends = Backends(clock=clock, keys=ApiKeys(folder, clock=clock), stall=stall)
        self.table = EMPTY
        self.generator = Generator(
            routes=lambda: self.table,
            backends=self.backends,
            admission=Admission(clock),
            recorder=cast("Recorder", self.notes),
            hedge=HedgeLimits(),
            relay=RelayLimits(slow_reader_seconds=0.1),
            cache_salts=CacheSalts(InputHasher(bytes(32))),
            count_prompt=_no_count,
            clock=clock,
        )

    def route(self, providers: Sequence[MockProvider], *, max_output_tokens: int = 100) -> None:
        """Deploys them, the newest version first; all others generate up to `max_output_tokens`."""
        targets = [
            RouteTarget(
                deployment=f"deployments/{version}",
                model_version=f"models/m/versions/{version}.0.0",
                schema=ModelSchema(
                    kind=MODEL_KIND_CHAT,
                    max_output_tokens=100 if version == len(providers) else max_output_tokens,
                ),
                backends=[
                    provider_backend(f"provider-{version}", provider.base_url, model="upstream")
                ],
            )
            for version, provider in zip(range(len(providers), 0, -1), providers, strict=True)
        ]
        self.table = RouteTable(
            epoch="e", revision=1, routes=[ModelRoute(model="m", targets=targets)]
        )

    async def ask(self, call: ChatCall = CALL) -> tuple[str, str, str]:
        """Returns the text, the version and the reason."""
        texts = []

        async def deliver(chunk: Chunk, _started: Started | None) -> None:
            texts.append(chunk.text)

        result = await self.generator.answer(call, CALLER, deliver)
        return "".join(texts), result.route.model_version, result.route.reason


@pytest.fixture
async def mesh(tmp_path) -> AsyncIterator[Mesh]:
    mesh = Mesh(tmp_path)
    yield mesh
    await mesh.backends.close()


@pytest.fixture
async def servers() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def providers_of(servers: AsyncExitStack, *modes: str) -> list[MockProvider]:
    return [await servers.enter_async_context(mock_provider(mode)) for mode in modes]


async def test_deployments_are_asked_in_the_order_of_the_route(mesh, servers):
    """Each once; the bill names the one that answered."""
    providers = await providers_of(servers, "500", "401", "ok", "ok")
    mesh.route(providers)
    assert await mesh.ask() == (
        TEXT,
        "models/m/versions/2.0.0",
        "fallback: the backends of models/m/versions/3.0.0 failed",
    )
    assert [len(provider.requests) for provider in providers] == [1, 1, 1, 0]
    (outcome,) = mesh.notes.outcomes
    assert outcome.choice.target.model_version == "models/m/versions/2.0.0"


async def test_if_all_fail_the_first_one_is_retried(mesh, servers):
    """And the caller gets its failure, as if there were no others."""
    providers = await providers_of(servers, "500", "500")
    mesh.route(providers)
    with pytest.raises(Unavailable) as raised:
        await mesh.ask()
    assert raised.value.metadata == {"backend": "provider-2", "request_id": "r"}
    assert len(providers[0].requests) > 1
    assert len(providers[1].requests) == 1


async def test_a_deployment_with_shorter_answers_is_not_a_fallback(mesh, servers):
    """The first one is retried instead, as without it."""
    providers = await providers_of(servers, "500", "ok")
    mesh.route(providers, max_output_tokens=10)
    call = replace(CALL, request=replace(CALL.request, max_tokens=50))
    with pytest.raises(Unavailable):
        await mesh.ask(call)
    assert len(providers[0].requests) > 1
    assert providers[1].requests == []


async def test_an_answer_that_started_stays_with_its_version(mesh, servers):
    """Another version would answer differently."""
    providers = await providers_of(servers, "cut_mid", "ok")
    mesh.route(providers)
    with pytest.raises(Unavailable):
        await mesh.ask()
    assert providers[1].requests == []


async def test_an_answer_without_a_reader_ends(mesh, servers, monkeypatch):
    """Its slot is free again, and what was generated is billed."""
    monkeypatch.setattr(relay_module, "MAX_WAITING_CHUNKS", 1)
    mesh.route(await providers_of(servers, "slow"))

    async def never(_chunk: Chunk, _started: Started | None) -> None:
        await asyncio.Event().wait()

    async with asyncio.timeout(10):
        with pytest.raises(ResourceExhausted) as raised:
            await mesh.generator.answer(CALL, CALLER, never)
    assert raised.value.reason == "READER_TOO_SLOW"
    (outcome,) = mesh.notes.outcomes
    assert outcome.error is raised.value
    assert 0 < outcome.usage.completion_tokens < 9
    assert (await mesh.ask())[0] == TEXT
