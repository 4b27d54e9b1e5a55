"""The events of `Generate`: how an answer starts, and how a client continues it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from headrace.common.v1.backend_pb2 import Backend
from headrace.common.v1.model_pb2 import MODEL_KIND_CHAT, ModelSchema
from headrace.inference.v1 import inference_pb2
from headrace.inference.v1.inference_pb2 import ROLE_USER, GenerateRequest
from headrace.router.v1.router_internal_pb2 import ModelRoute, RouteTarget

from libs.chat.wire import text_message
from libs.clock import SystemClock
from libs.errors import InvalidArgument, NotFound, Unavailable
from libs.routes import RouteTable
from libs.telemetry.hashing import InputHasher
from services.inference.accounting import Outcome, Recorder, UncountedPrompt
from services.inference.admission import Admission
from services.inference.api.grpc import InferenceServicer
from services.inference.backends.openai_http.api_keys import ApiKeys
from services.inference.backends.pool import Backends
from services.inference.backends.stall import StallLimits
from services.inference.cache_salts import CacheSalts
from services.inference.generation import failover as failover_module
from services.inference.generation import generator as generator_module
from services.inference.generation.generator import Generator
from services.inference.generation.hedging import HedgeLimits
from services.inference.generation.relay import RelayLimits
from services.inference.tensors.count_tokens import TokenCounter
from tests.support.backends import provider_backend, triton_backend
from tests.support.embedding import eventually
from tests.support.provider import TEXT, MockProvider, mock_provider
from tests.support.triton import TEXT as TRITON_TEXT
from tests.support.triton import MockTriton, mock_triton

Server = MockTriton | MockProvider


class Call:
    """Keeps what a servicer writes."""

    def __init__(self) -> None:
        self.events: list[inference_pb2.GenerateResponse] = []
        self.wrote = asyncio.Event()

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("x-headrace-tenant", "t"), ("x-headrace-user", "u"))

    def time_remaining(self) -> float | None:
        return None

    async def write(self, event: inference_pb2.GenerateResponse) -> None:
        # As gRPC does: the servicer may reuse the message once this returns.
        message = event.SerializeToString()
        self.events.append(inference_pb2.GenerateResponse.FromString(message))
        self.wrote.set()

    @property
    def kinds(self) -> list[str | None]:
        return [event.WhichOneof("event") for event in self.events]

    @property
    def text(self) -> str:
        return "".join(event.delta.text for event in self.events)

    @property
    def deltas(self) -> list[inference_pb2.Delta]:
        return [event.delta for event in self.events if event.HasField("delta")]


class Bills:
    """Keeps what would be billed.

    Attributes:
        prompts: would count the prompts that are billed.
    """

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.prompts: list[UncountedPrompt] = []

    async def record(self, outcome: Outcome) -> int:
        self.outcomes.append(outcome)
        return 7

    def record_later(self, outcome: Outcome, *, prompt: UncountedPrompt | None = None) -> None:
        self.outcomes.append(outcome)
        if prompt is not None:
            self.prompts.append(prompt)

    async def last(self) -> tuple[int, int]:
        """Returns the tokens of prompt and answer in the last bill."""
        prompts = [await prompt.count() for prompt in self.prompts]
        usage = self.outcomes[-1].usage
        return usage.prompt_tokens + sum(prompts), usage.completion_tokens


class Service:
    """The servicer, over one model whose versions, the newest first, have one server each."""

    def __init__(self, folder: Path) -> None:
        clock = SystemClock()
        self.bills = Bills()
        self.table = RouteTable(epoch="e", revision=1, routes=[])
        self.backends = Backends(
            clock=clock,
            keys=ApiKeys(folder, clock=clock),
            stall=StallLimits(first_token_seconds=5.0, between_tokens_seconds=5.0),
        )
        routes: Callable[[], RouteTable] = lambda: self.table  # noqa: E731  # typed
        admission = Admission(clock)
        counter = TokenCounter(routes=routes, backends=self.backends, admission=admission)
        generator = Generator(
            routes=routes,
            backends=self.backends,
            admission=admission,
            recorder=cast("Recorder", self.bills),
            hedge=HedgeLimits(),
            relay=RelayLimits(),
            cache_salts=CacheSalts(InputHasher(bytes(32))),
            count_prompt=counter.count_unfinished,
            clock=clock,
        )
        self.servicer = InferenceServicer(generator=generator, counter=counter, clock=clock)

    def route(self, **servers: Server) -> None:
        """Deploys servers by their versions, such as `v2=…`."""
        targets = [
            RouteTarget(
                deployment=f"deployments/{name}",
                model_version=f"models/m/versions/{name[1:]}.0.0",
                artifact_digest=f"sha256:{name}",
                schema=ModelSchema(kind=MODEL_KIND_CHAT, max_output_tokens=100),
                backends=[_backend(server)],
            )
            for name, server in servers.items()
        ]
        self.table = RouteTable(
            epoch="e", revision=4, routes=[ModelRoute(model="m", targets=targets)]
        )

    async def generate(self, call: Call | None = None, **fields: Any) -> Call:
        """Runs one call to its end."""
        call = call or Call()
        await self.servicer.Generate(request(**fields), cast("Any", call))
        return call


def request(**fields: Any) -> GenerateRequest:
    messages = [text_message(ROLE_USER, "hello")]
    return GenerateRequest(**{"model": "m", "messages": messages, **fields})


def _backend(server: Server) -> Backend:
    if isinstance(server, MockTriton):
        return triton_backend("triton-0", server.address)
    return provider_backend("provider", server.base_url)


@asynccontextmanager
async def service_of(folder: Path, **behaviours: dict[str, Any]) -> AsyncIterator[Service]:
    """Runs a service with a Triton for each version."""
    async with AsyncExitStack() as stack:
        service = Service(folder)
        stack.push_async_callback(service.backends.close)
        servers = {
            name: await stack.enter_async_context(mock_triton(**behaviour))
            for name, behaviour in behaviours.items()
        }
        service.route(**servers)
        yield service


async def test_the_first_event_has_what_pricing_needs(tmp_path: Path) -> None:
    """Id, trace, route, version and digest, and the last event has the same ones."""
    async with service_of(tmp_path, v1={}) as service:
        call = await service.generate()
    assert call.kinds == ["started", *["delta"] * 4, "final"]
    started, final = call.events[0].started, call.events[-1].final
    assert started.request_id
    assert started.model_version == "models/m/versions/1.0.0"
    assert started.artifact_digest == "sha256:v1"
    assert (started.route.deployment, started.route.revision) == ("deployments/v1", 4)
    for name in ("request_id", "trace_id", "route", "model_version", "artifact_digest"):
        assert getattr(started, name) == getattr(final, name)
    assert final.finish_reason == inference_pb2.FINISH_REASON_STOP
    assert final.time_to_first_token.ToTimedelta().total_seconds() > 0
    assert final.cost_nano_usd == 7
    assert call.text == TRITON_TEXT


async def test_each_delta_can_be_continued(tmp_path: Path) -> None:
    """The rest is the rest of the same text; the tokens before it are not billed."""
    async with service_of(tmp_path, v1={}) as service:
        complete = await service.generate()
        for count, delta in enumerate(complete.deltas, start=1):
            rest = await service.generate(resume_from=delta.resume_token)
            assert [each.text for each in rest.deltas] == [d.text for d in complete.deltas[count:]]
            assert [each.resume_token for each in rest.deltas] == [
                each.resume_token for each in complete.deltas[count:]
            ]
            assert rest.kinds[0] == "started"
            assert rest.events[-1].final.usage.completion_tokens == 4 - count


async def test_an_answer_continues_on_its_own_version(tmp_path: Path) -> None:
    """Also when a newer one is deployed in the meantime."""
    async with service_of(tmp_path, v1={}) as old, service_of(tmp_path, v2={}, v1={}) as new:
        token = (await old.generate()).deltas[1].resume_token
        rest = await new.generate(resume_from=token)
        assert rest.events[0].started.model_version == "models/m/versions/1.0.0"
        assert rest.text == "three four "
    async with service_of(tmp_path, v2={}) as newest:
        with pytest.raises(NotFound, match=r"m@1\.0\.0"):
            await newest.generate(resume_from=token)


async def test_a_token_of_another_request_is_refused(tmp_path: Path) -> None:
    """It says nothing about this answer."""
    async with service_of(tmp_path, v1={}) as service:
        token = (await service.generate()).deltas[1].resume_token
        for fields in (
            {"messages": [text_message(ROLE_USER, "goodbye")]},
            {"stop": ["x"]},
            {"model": "m@1.0.0"},
        ):
            with pytest.raises(InvalidArgument) as caught:
                await service.generate(resume_from=token, **fields)
            assert [field for field, _ in caught.value.field_violations] == ["resume_from"]


async def test_a_position_behind_the_answer_is_refused(tmp_path: Path) -> None:
    """The answer has four tokens; they were generated to find that out, and are paid."""
    async with service_of(tmp_path, v1={}) as service:
        token = (await service.generate()).deltas[0].resume_token
        behind = f"{token.partition('.')[0]}.5"
        with pytest.raises(InvalidArgument):
            await service.generate(resume_from=behind)
        assert await service.bills.last() == (5, 4)


@pytest.mark.parametrize(("position", "max_tokens"), [(101, 100), (999_999_999, 100), (6, 5)])
async def test_a_position_behind_the_longest_answer_costs_no_work(
    tmp_path: Path, position: int, max_tokens: int
) -> None:
    """It is refused before a backend is called."""
    async with mock_triton() as triton, service_of(tmp_path) as service:
        service.route(v1=triton)
        token = (await service.generate(max_tokens=max_tokens)).deltas[0].resume_token
        behind = f"{token.partition('.')[0]}.{position}"
        with pytest.raises(InvalidArgument) as caught:
            await service.generate(resume_from=behind, max_tokens=max_tokens)
        assert caught.value.field_violations[0][0] == "resume_from"
        assert len(triton.requests) == 1


@pytest.mark.parametrize("tokens", [0, 2])
async def test_a_caller_who_leaves_pays_for_prompt_and_answer(tmp_path: Path, tokens: int) -> None:
    """The engine is stopped; what it has read and generated is billed."""
    async with mock_triton(stalls_after=tokens) as triton, service_of(tmp_path) as service:
        service.route(v1=triton)
        call = Call()
        running = asyncio.create_task(service.generate(call))
        await eventually(lambda: len(call.deltas) >= tokens and bool(triton.requests))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await asyncio.wait_for(triton.left.wait(), 2)
        assert await service.bills.last() == (5, tokens)


async def test_a_caller_who_leaves_before_the_position_it_resumes_at_pays(tmp_path: Path) -> None:
    """Else work would be free for those who always leave in time."""
    async with mock_triton() as triton, service_of(tmp_path) as service:
        service.route(v1=triton)
        token = (await service.generate()).deltas[2].resume_token
        triton.stalls_after = 2
        running = asyncio.create_task(service.generate(resume_from=token))
        await eventually(lambda: len(triton.requests) == 2)
        await asyncio.sleep(0.2)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert await service.bills.last() == (5, 2)


async def test_a_failure_of_the_backends_leaves_the_prompt_unbilled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller pays for the tokens that it has, and here it has none."""
    monkeypatch.setattr(failover_module, "FAILOVER_WAIT_SECONDS", 0.2)
    async with service_of(tmp_path, v1={"dies_after": 0}) as service:
        with pytest.raises(Unavailable):
            await service.generate()
        assert await service.bills.last() == (0, 0)


async def test_an_answer_that_would_differ_has_no_tokens(tmp_path: Path) -> None:
    """Sampled without a seed; with one it has them."""
    async with service_of(tmp_path, v1={}) as service:
        sampled = await service.generate(temperature=1.0)
        assert not any(delta.resume_token for delta in sampled.deltas)
        seeded = await service.generate(temperature=1.0, seed=3)
        assert all(delta.resume_token for delta in seeded.deltas)


async def test_an_answer_of_a_provider_has_no_tokens(tmp_path: Path) -> None:
    """Its chunks are not tokens."""
    async with mock_provider() as provider, service_of(tmp_path) as service:
        service.route(v1=provider)
        call = await service.generate()
    assert call.text == TEXT
    assert not any(delta.resume_token for delta in call.deltas)


async def test_a_failure_before_the_first_token_is_only_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to price and nothing to continue."""
    monkeypatch.setattr(failover_module, "FAILOVER_WAIT_SECONDS", 0.2)
    async with service_of(tmp_path, v1={"dies_after": 0}) as service:
        call = Call()
        with pytest.raises(Unavailable):
            await service.generate(call)
    assert call.events == []


async def test_a_late_answer_starts_before_its_first_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that waits long learns the id of its request; the stream has no second start."""
    monkeypatch.setattr(generator_module, "START_SECONDS", 0.05)
    async with service_of(tmp_path, v1={"stalls_after": 0}) as service:
        call = Call()
        running = asyncio.create_task(service.generate(call))
        await asyncio.wait_for(call.wrote.wait(), 2)
        assert call.kinds == ["started"]
        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_no_start_is_sent_while_another_version_may_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start names the version that answers, after a fallback as well."""
    monkeypatch.setattr(generator_module, "START_SECONDS", 0.01)
    async with (
        mock_triton() as good,
        mock_provider("stall_first") as bad,
        service_of(tmp_path) as service,
    ):
        service.route(v2=bad, v1=good)
        call = Call()
        running = asyncio.create_task(service.generate(call))
        await bad.asked.wait()
        await asyncio.sleep(0.1)
        assert call.events == []
        bad_backend = service.table.choose("m", kind=None).target.backends[0]
        assert bad_backend.status.id == "provider"
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    async with mock_triton() as good, mock_provider("500") as bad, service_of(tmp_path) as service:
        service.route(v2=bad, v1=good)
        call = await service.generate()
    assert call.kinds.count("started") == 1
    assert call.events[0].started.model_version == "models/m/versions/1.0.0"
    assert call.events[0].started.route == call.events[-1].final.route
